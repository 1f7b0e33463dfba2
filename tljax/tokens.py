"""Texts as the numbered tokens of CLIP, by the library `tokenizers` (extra `clip`)."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tljax import files, weights
from tljax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
# What lies with weights, the first that is there; vocab.json needs merges.txt beside it.
BESIDE = ("tokenizer.json", "vocab.json", "bpe_simple_vocab_16e6.txt.gz")
# OpenAI's list of merges, of which all published CLIP's vocabularies are made, inside packages that carry it.
PACKAGES = ("open_clip", "clip")
MERGES = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_LONGEST = 1000  # characters of a line, of which gzip could make any number from a few bytes
_MERGES_USED = 49152 - 256 - 2  # of those in the list
_PIECES = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+".replace("<|", r"<\|")


class Tokenizer:
    """CLIP's tokens by number: `end` is the one that ends a text, `size` the number of them all."""

    def __init__(self, backend, source: str):
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.source, self.size = backend, source, backend.get_vocab_size()
        self._start, self.end = (backend.token_to_id(token) for token in (START, END))
        if self._start is None or self.end is None:
            raise UserError(f"tokenizer {source}: it has no {START} or no {END}, which CLIP's texts begin and end with")
        if max(backend.get_vocab().values()) >= self.size:
            raise UserError(f"tokenizer {source}: its {self.size} tokens are not numbered from 0 on")

    def __call__(self, texts: Sequence[str], context: int) -> np.ndarray:
        """int32 [texts, context]: a text's tokens between start and end, filled up with ends.

        Raises UserError for a text of more tokens than `context`.
        """
        rows = [self._backend.encode(text, add_special_tokens=False).ids for text in texts]
        for text, row in zip(texts, rows):
            if len(row) + 2 > context:
                short = text if len(text) < 80 else f"{text[:80]} …"
                raise UserError(f"{short!r} has {len(row)} tokens, the text tower takes {context - 2}")
        filled = [[self._start, *row, *(self.end,) * (context - 1 - len(row))] for row in rows]
        return np.array(filled, np.int32).reshape(-1, context)


def load(given: str, source: str = "") -> Tokenizer:
    """The tokenizer of a file, a folder, "package:…" or "hf:org/name"; "": the one beside the weights of `source`.

    Where none lies there, OpenAI's vocabulary is taken from an installed package that carries it.

    A file is a tokenizer.json, a vocab.json with its merges.txt, or OpenAI's list of merges. Raises UserError, which
    says what would be needed and where.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError("CLIP's texts need the library tokenizers: pip install -e '.[clip]'") from None
    if given:
        return _named(given)
    for name in BESIDE if source else ():
        path = weights.beside(source, name)
        if path and (name != "vocab.json" or weights.beside(source, "merges.txt")):
            return _read(path)
    for package in PACKAGES:
        try:
            path = files.locate(f"package:{package}/{MERGES}", "tokenizer")
            files.check(SHA256, path)
        except UserError:  # not installed, or another package of that name
            continue
        return _read(path)
    place = f"beside the weights {source}" if source else "given"
    raise UserError(
        f"no tokenizer is {place} (tokenizer.json, or vocab.json and merges.txt), and no installed package carries "
        f"CLIP's vocabulary (`pip install --no-deps open_clip_torch`): put one there, or name it with --tokenizer=FILE "
        f"or config.tokenizer"
    )


def _named(given: str) -> Tokenizer:
    if given.startswith("hf:"):
        for name in BESIDE[:2]:
            path = weights.beside(given, name)
            if path and (name != "vocab.json" or weights.beside(given, "merges.txt")):
                return _read(path)
        raise UserError(
            f"tokenizer {given!r}: neither its cache nor the hub gives a {BESIDE[0]}, or a {BESIDE[1]} with merges.txt"
        )
    path = files.locate(given, "tokenizer")
    if path.is_dir():
        held = [path / name for name in BESIDE if (path / name).is_file()]
        if not held:
            raise UserError(f"tokenizer {given!r}: the folder holds none of {', '.join(BESIDE)}")
        path = held[0]
    return _read(path)


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        if path.suffix == ".gz" or path.name.endswith(".txt"):
            return Tokenizer(_of_merges(path), str(path))
        found = files.parsed(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and "model" in found:
            return Tokenizer(Backend.from_file(str(path)), str(path))
        merges = (path.parent / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in merges if line and not line.startswith("#version")]
        return Tokenizer(_bpe(found, pairs), str(path))
    except FileNotFoundError as error:
        raise UserError(f"tokenizer {path}: {error.filename} does not exist") from None
    except UserError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"tokenizer {path}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:  # the library has none of its own
        raise UserError(f"tokenizer {path} cannot be used: {' '.join(str(error).split())[:160]}") from None


def _of_merges(path: Path):
    """Of OpenAI's list: the vocabulary is the bytes, the bytes that end a word, then what the merges make, in order."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = [file.readline(_LONGEST) for _ in range(_MERGES_USED + 1)][1:]
    pairs = [tuple(line.split()) for line in lines if line.strip("\n")]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # As in GPT-2: bytes that no character shows stand for themselves as the characters from 256 on.
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*alphabet, *(f"{c}</w>" for c in alphabet), *map("".join, pairs), START, END]
    return _bpe({word: number for number, word in enumerate(words)}, pairs)


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]):
    """Byte-pair encoding as CLIP has it: lower case, words in one piece, their last letter marked."""
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    backend = Backend(BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in (START, END) if token in vocabulary])
    return backend
