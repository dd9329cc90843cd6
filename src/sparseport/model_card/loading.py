"""How to load an exported folder: a few lines of Python for each runtime that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROMPT = "Why does ice float on water?"
_PROMPT = f'"{PROMPT}"'
_QUESTION = f'[{{"role": "user", "content": {_PROMPT}}}]'
_WITHOUT_TOKENIZER = (
    "The folder has no tokenizer (it was exported with --no-tokenizer), so token ids go in and come out."
)


@dataclass(frozen=True)
class Snippet:
    """Code for one runtime: its name, how to install it, the lines, and what to know."""

    runtime: str
    install: str
    code: str
    note: str = ""


def snippets(
    target: str, folder: str, tokenizer: bool, adapters: Sequence[str] = (), *, chat: bool = False
) -> list[Snippet]:
    """Code that loads a folder and lets the model answer.

    Args:
        target: openvino or onnx.
        folder: its name, as the code is to have it.
        tokenizer: whether the folder has one.
        adapters: files of un-merged adapters in it.
        chat: whether it has a chat template, so that the code asks as a user would.
    """
    name = _quoted(folder)
    found = _openvino(name, tokenizer, chat) if target == "openvino" else _onnx(name, tokenizer, chat)
    if adapters and tokenizer:
        found.append(_with_adapter(target, folder, sorted(adapters)[0]))
    return found


def _openvino(name: str, tokenizer: bool, chat: bool) -> list[Snippet]:
    optimum, genai = "Optimum Intel", "OpenVINO GenAI"
    load = f"model = OVModelForCausalLM.from_pretrained({name})"
    if not tokenizer:
        code = f"""\
import torch
from optimum.intel import OVModelForCausalLM

{load}
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=64))"""
        return [Snippet(optimum, "pip install optimum-intel[openvino]", code, _WITHOUT_TOKENIZER)]
    first = f"""\
import openvino_genai

pipe = openvino_genai.LLMPipeline({name}, "CPU")
print(pipe.generate({_PROMPT}, max_new_tokens=64))"""
    second = f"""\
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer, pipeline

{load}
tokenizer = AutoTokenizer.from_pretrained({name})
answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(answer({_QUESTION if chat else _PROMPT}, max_new_tokens=64))"""
    return [
        Snippet(genai, "pip install openvino-genai", first),
        Snippet(optimum, "pip install optimum-intel[openvino]", second),
    ]


def _onnx(name: str, tokenizer: bool, chat: bool) -> list[Snippet]:
    asked = f"tokenizer.apply_chat_template('{_QUESTION}', add_generation_prompt=True)" if chat else _PROMPT
    tokens = "tokenizer.encode(prompt)" if tokenizer else "[1, 2, 3]"
    prompt = f"prompt = {asked}\n" if tokenizer else ""
    answer = "generator.get_sequence(0)"
    code = f"""\
import onnxruntime_genai as og

model = og.Model({name})
{"tokenizer, " if tokenizer else ""}parameters = {"og.Tokenizer(model), " if tokenizer else ""}og.GeneratorParams(model)
parameters.set_search_options(max_length=128)
generator = og.Generator(model, parameters)
{prompt}generator.append_tokens({tokens})
while not generator.is_done():
    generator.generate_next_token()
print({f"tokenizer.decode({answer})" if tokenizer else answer})"""
    note = "" if tokenizer else _WITHOUT_TOKENIZER
    return [Snippet("onnxruntime-genai", "pip install onnxruntime-genai", code, note)]


def _with_adapter(target: str, folder: str, file: str) -> Snippet:
    name, path = _quoted(folder), _quoted(f"{folder}/{file}")
    if target == "openvino":
        code = f"""\
import openvino_genai as genai

adapter, scheduler = genai.Adapter({path}), genai.SchedulerConfig()
scheduler.enable_prefix_caching = False
pipe = genai.LLMPipeline({name}, "CPU", adapters=genai.AdapterConfig(adapter), scheduler_config=scheduler)
print(pipe.generate({_PROMPT}, max_new_tokens=64, adapters=genai.AdapterConfig(adapter)))"""
        note = "Caching of prefixes is off because GenAI's cache does not know which adapter its entries came from."
        return Snippet("OpenVINO GenAI, with its adapter", "pip install openvino-genai", code, note)
    code = f"""\
import onnxruntime_genai as og

model = og.Model({name})
adapters = og.Adapters(model)
adapters.load({path}, "tuned")
generator = og.Generator(model, og.GeneratorParams(model))
generator.set_active_adapter(adapters, "tuned")"""
    note = "Then go on as above, with generator.append_tokens."
    return Snippet("onnxruntime-genai, with its adapter", "pip install onnxruntime-genai", code, note)


def _quoted(text: str) -> str:
    """A text as Python has it in its code, in double quotes where that needs no escapes."""
    plain = text.isprintable() and not set(text) & {'"', "\\"}
    return f'"{text}"' if plain else repr(text)
