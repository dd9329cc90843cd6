"""`sparseport chat`: ask an exported folder something, once or in a conversation."""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
from pathlib import Path
from typing import Any

from sparseport.chat.conversation import Answer, Conversation, Sampling
from sparseport.chat.folder import ChatFolder, context_length, open_folder, require_tokenizer
from sparseport.errors import SparseportError, UsageError
from sparseport.progress import Progress

NAME = "chat"
HELP = "Talk to an exported folder in its runtime, or get one answer."
EXAMPLE = "sparseport chat out --max-tokens 200"


def add_chat(verb: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    verb.add_argument("folder", type=Path, help="exported folder, or one with openvino/ and onnx/ in it")
    verb.add_argument(
        "--prompt", metavar="TEXT", help="give one answer and leave (also: text piped into standard input)"
    )
    verb.add_argument("--system", metavar="TEXT", help="instruction before the conversation")
    verb.add_argument(
        "--target", choices=["openvino", "onnx"], help="which folder of an export to both (default openvino)"
    )
    verb.add_argument(
        "--adapter",
        metavar="NAME",
        help="which adapter of a folder exported with --branches adapter is switched on, or none for the base alone "
        "(default: the one that is there)",
    )
    verb.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="tokens of an answer at most (default 512)"
    )
    verb.add_argument(
        "--temperature", type=float, metavar="T", help="draw tokens at random (default: always the likeliest)"
    )
    verb.add_argument("--seed", type=int, metavar="N", help="of the random numbers (default: another one each time)")
    verb.add_argument("--plain", action="store_true", help="continue the text as it stands, without the chat template")
    verb.add_argument(
        "--verify", action="store_true", help="compare the folder with its certificate first, bit for bit"
    )
    verb.set_defaults(run=run_chat, interrupted="nothing was written")


def run_chat(options: argparse.Namespace) -> int:
    """Run the verb; returns the exit status: 130 if the only answer was stopped.

    Raises:
        UsageError, VerificationError, BadInput, EnvironmentProblem: see `sparseport.chat`.
    """
    sampling = _sampling(options)
    if options.prompt is not None and not options.prompt.strip():
        raise UsageError("there is nothing to ask", where="--prompt", found="no text")
    chosen = open_folder(options.folder, options.target, options.adapter)
    require_tokenizer(chosen)
    prompt = _piped() if options.prompt is None and not sys.stdin.isatty() else options.prompt
    progress = Progress("quiet" if options.quiet else "auto")
    if options.verify:
        from sparseport.verify.folder import require, verify

        with progress.task("verifying") as step:
            require(verify(chosen.path, on_step=step))
    from sparseport.chat.engines import load_engine
    from sparseport.chat.terminal import answer, talk

    with progress.task(f"loading {chosen.path.name}"):
        engine = load_engine(chosen)
    conversation = Conversation(engine, sampling, options.system, options.plain, context_length(chosen))
    if conversation.plain and not options.plain:
        progress.note("the folder has no chat template: each text is continued as it stands, by itself")

    def report(text: str, found: Answer) -> None:
        if options.json:
            print(json.dumps(_document(chosen, conversation, text, found)), flush=True)
        progress.note(summary(found))

    def refuse(error: SparseportError) -> None:
        if options.json:
            print(json.dumps({"error": error.as_dict()}), flush=True)
        print(error, file=sys.stderr)

    if prompt is not None:
        found = answer(conversation, prompt, stream=not options.json)
        report(prompt, found)
        return 130 if found.finish == "stopped" else 0
    adapter = f" with {chosen.adapter}" if chosen.adapter else ""
    progress.note(f"{chosen.path.name} ({chosen.target}){adapter}: /help shows commands, Ctrl-D leaves")
    talk(conversation, report, refuse, stream=not options.json)
    return 0


def summary(answer: Answer) -> str:
    """The line below an answer."""
    rate = "" if answer.per_second is None else f", {answer.per_second:.1f} tokens/s"
    ends = {"end": "", "length": "; --max-tokens or the model's context ended it", "stopped": "; stopped"}
    return f"{answer.tokens} tokens{rate}, first after {answer.first_token:.2f} s{ends[answer.finish]}"


def _document(folder: ChatFolder, conversation: Conversation, prompt: str, answer: Answer) -> dict[str, Any]:
    sampling = conversation.sampling
    return {
        "prompt": prompt,
        **answer.as_dict(),
        "target": folder.target,
        "adapter": folder.adapter,
        "template": not conversation.plain,
        "temperature": sampling.temperature,
        "seed": None if sampling.temperature is None else sampling.seed,
        "certificate_sha256": folder.certificate.seal(),
    }


def _sampling(options: argparse.Namespace) -> Sampling:
    if options.max_tokens < 1:
        raise UsageError("an answer has one token or more", where="--max-tokens", found=options.max_tokens)
    temperature = options.temperature
    if temperature is None:
        if options.seed is not None:
            raise UsageError("a seed changes nothing without a temperature", where="--seed", fix="give --temperature")
        return Sampling(options.max_tokens)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(
            "a temperature is larger than 0",
            where="--temperature",
            found=temperature,
            fix="leave it out: the likeliest token is taken then",
        )
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    if not 0 <= seed < 2**31:
        raise UsageError("no such seed", where="--seed", expected="0 to 2147483647", found=seed)
    return Sampling(options.max_tokens, temperature, seed)


def _piped() -> str:
    """What is piped into standard input.

    Raises:
        UsageError: nothing, or something that is no text.
    """
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("standard input is no text", found=str(error), fix="pipe text, or give --prompt") from error
    if not text.strip():
        raise UsageError("there is nothing to ask", where="standard input", found="no text", fix="give --prompt TEXT")
    return text.removesuffix("\n")
