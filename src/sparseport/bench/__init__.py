"""How fast folders run on this machine: a fresh process per measurement, interleaved rounds, medians with ranges.

subjects    what a path is, and which engines run it
engines/    one file per engine; its name, with `-` for `_`, is what users type
worker      one measurement, in a process of its own
rounds      all measurements, in turns
traffic     bytes that a token has to read, and the memory's bandwidth
run         `bench()`: all of it, as a result that is JSON
"""
