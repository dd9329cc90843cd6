"""Folders on their way to another machine: one archive, bit-exact when unpacked, small where weights are sparse."""
