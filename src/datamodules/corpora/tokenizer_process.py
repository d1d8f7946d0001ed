"""The process in which Hugging Face tokenizers work: started by ``apart.py``, of which it imports nothing, nor of the rest.

A tokenizer.json is a small program of somebody else's: its regular expressions may take for ever, its steps may multiply a
text, and the library, which is written in Rust, may panic. Here that ends this process, and nobody else's.

Requests come on stdin and answers go to stdout, each as the length of a JSON text, the length of an array of int32,
and these two. The kernel ends the process when a request takes more computing time than it says, whatever the library is
doing; time, because a busy machine is nobody's fault.
"""

import json
import signal
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

LENGTHS = struct.Struct("<QQ")
MOST_DEFINITIONS = 8
"""As many are kept; who asks for another one sends it again."""

_known: dict[str, tokenizers.Tokenizer] = {}


def main(most_bytes: int) -> None:
    """Answer requests until there are no more; with more than `most_bytes` of memory the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who has started it decides
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError):
        pass
    source, drain = sys.stdin.buffer, sys.stdout.buffer
    while (request := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            answer, numbers = _answer(request, source)
        except Exception as error:  # the binding raises bare Exception
            answer, numbers = {"error": str(error)}, array("i")
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # not to be imported
                raise
            answer, numbers = {"error": f"the tokenizers library failed: {error}"}, array("i")
        text = json.dumps(answer).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        drain.write(LENGTHS.pack(len(text), len(numbers) * numbers.itemsize) + text)
        drain.write(numbers.tobytes())
        drain.flush()


def _read(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(LENGTHS.size)
    if len(head) < LENGTHS.size:
        return None
    size, _ = LENGTHS.unpack(head)
    return json.loads(source.read(size))


def _answer(request: dict[str, Any], source: BinaryIO) -> tuple[dict[str, Any], array]:
    if "train" in request:
        return _trained(request["train"], source), array("i")
    if "definition" in request:
        backend = _opened(request["definition"])
        while len(_known) >= MOST_DEFINITIONS:
            del _known[next(iter(_known))]
        _known[request["key"]] = backend
        return _described(backend), array("i")
    backend = _known.get(request["key"])
    if backend is None:
        return {"unknown": True}, array("i")
    if "ids" in request:
        return {"text": backend.decode(request["ids"], skip_special_tokens=True)}, array("i")
    encodings = backend.encode_batch_fast(request["texts"], add_special_tokens=False)
    numbers, lengths = array("i"), []
    for encoding in encodings:
        ids = encoding.ids
        numbers.extend(ids)
        lengths.append(len(ids))
        if len(numbers) > request["most"]:
            raise ValueError(f"it makes more than {request['most']} tokens of it, out of all proportion")
    return {"lengths": lengths}, numbers


def _trained(options: dict[str, Any], source: BinaryIO) -> dict[str, Any]:
    """Byte-level BPE, trained on the texts of the requests that follow, up to one without texts.

    Each of them brings more time. The last one says after how many bytes words are cut, if any was.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = words  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=options["vocab_size"],
        special_tokens=options["special_tokens"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    last: dict[str, Any] = {}

    def texts() -> Iterator[str]:
        while (part := _read(source)) is not None:
            left, _ = signal.getitimer(signal.ITIMER_PROF)
            signal.setitimer(signal.ITIMER_PROF, left + part["seconds"])
            if not part["texts"]:
                last.update(part)
                return
            yield from part["texts"]
        raise EOFError("the texts have no end")

    backend.train_from_iterator(texts(), trainer)
    if last.get("cut"):
        cut = pre_tokenizers.Split(tokenizers.Regex(f".{{{last['cut']}}}"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, cut])  # pyright: ignore[reportAttributeAccessIssue]
    return {"definition": backend.to_str(), "size": backend.get_vocab_size()}


def _opened(definition: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(definition)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    # It would only add special tokens, which are put in elsewhere, and may repeat the text.
    backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _described(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    definition = json.loads(backend.to_str())
    added = backend.get_added_tokens_decoder()
    return {
        "vocabulary": backend.get_vocab(with_added_tokens=True),
        "own": backend.get_vocab(with_added_tokens=False),
        "added": [[index, token.content, token.special] for index, token in added.items()],
        "byte_level": '"ByteLevel"' in json.dumps([definition["pre_tokenizer"], definition["decoder"]]),
        "byte_fallback": bool(definition["model"].get("byte_fallback")),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
