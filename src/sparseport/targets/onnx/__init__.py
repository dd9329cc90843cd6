"""ONNX Runtime: graph, weights out, and read back.

Out, in the order of an export:
  builder         the graph without weights, made by onnxruntime-genai's builder in a process of its own
  tokenizer       whether onnxruntime-genai reads the tokenizer as transformers does, in the same process
  writer, store   takes merged weights and keeps them, packed, in a scratch file
  graph           puts them into the graph; `products` makes the nodes, `data_file` the external data
  standard_*      for `qdq`: the graph again in operators of the ONNX standard
  folder          genai_config.json
Back, with none of that code: `graph_file` parses, `readback` follows products to their weights. `structure` is what
both sides share: the digest of a graph without its weights.
"""
