"""Tokenizers of weights: identifies that of a folder, and makes the files of transformers and open_clip."""

import hashlib
import json
from typing import Any

import tokenizers
from etils import epath
from tokenizers import processors

from xclip_jax.core import storage
from xclip_jax.core.errors import UserError
from xclip_jax.core.storage import write_whole
from xclip_jax.data import tokenizer
from xclip_jax.interop import sentencepiece
from xclip_jax.interop.tensor_files import read_json

CLIP_SIZE = 49408
FILE = "tokenizer.json"
SENTENCEPIECE = "spiece.model"
CLIP_FILES = ("vocab.json", "merges.txt")
OPTIONS = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"


def identify(folder: epath.Path, size: int, eot: int | None, where: str) -> str:
    """Return the tokenizer of a text tower of `size` ids that pools at id `eot` (None: the largest id).

    Returns:
      The path of the folder's tokenizer.json, or "clip" where that has CLIP's vocabulary, or where it is missing and
      the sizes are CLIP's.

    Raises:
      UserError: neither has this number of ids and this end, or the folder has another vocabulary.
    """
    end = size - 1 if eot is None else eot
    like_clip = (size, end) == (CLIP_SIZE, CLIP_SIZE - 1)
    file, words = folder / FILE, folder / CLIP_FILES[0]
    if file.exists():
        if like_clip and _is_clips(read_json(file).get("model", {}).get("vocab")):
            return "clip"
        own = tokenizer.load(str(file))
        if (own.vocab_size, own.eot_id) != (size, end):
            remedy = f", or remove {FILE} if the tokenizer is CLIP's" if like_clip else ""
            raise UserError(
                f"{where} has {size} token ids and pools texts at id {end}; {file} has {own.vocab_size} and ends texts "
                f"with {own.eot_id}. Replace it by the {FILE} of these weights{remedy}."
            )
        return str(file)
    if not like_clip:
        raise UserError(
            f"{where} has a vocabulary of {size} with end {end}, which is not CLIP's, and no {FILE} in its folder; "
            "copy the file of its tokenizer there."
        )
    if words.exists() and not _is_clips(read_json(words)):
        raise UserError(
            f"{words} is not CLIP's vocabulary; save the tokenizer as {FILE} beside it, as transformers' "
            "save_pretrained does."
        )
    return "clip"


def siglip(folder: epath.Path, size: int, cleaning: str, where: str) -> str:
    """Return the path of SigLIP's tokenizer of a folder, with `size` ids: no start, an end, and padding that counts.

    The folder's file says neither what pads nor how texts are cleaned; one that says so too is made in the cache.

    Args:
      folder: with tokenizer.json or spiece.model; tokenizer_config.json names the padding, else the end pads.
      size: ids of the text tower.
      cleaning: of the first SigLIP, a name of `tokenizer.CLEANINGS`. The second only has texts in lower case.
      where: path of the weights, for errors.

    Raises:
      UserError: no file, a damaged one, or one of another vocabulary.
    """
    file, pieces = folder / FILE, folder / SENTENCEPIECE
    if pieces.exists():
        file, model = pieces, sentencepiece.convert(pieces.read_bytes(), str(pieces))
    elif file.exists():
        model = _library_tokenizer(file)
    else:
        raise UserError(
            f"{where} has no {FILE} or {SENTENCEPIECE} in its folder; copy the file of its tokenizer there."
        )
    options = read_json(folder / OPTIONS) if (folder / OPTIONS).exists() else {}
    model.no_padding()
    model.no_truncation()
    added = model.encode("").ids  # by the file's own template
    end = str(model.id_to_token(added[-1])) if added else _token(options.get("eos_token")) or "</s>"
    pad = _token(options.get("pad_token")) or end
    ids = [model.token_to_id(token) for token in (end, pad)]
    if any(i is None or i >= size for i in ids):
        raise UserError(
            f"{where} has {size} token ids; {file} ends texts with {end!r} and pads them with {pad!r}, of ids {ids[0]} "
            f"and {ids[1]}. Replace it by the file of these weights."
        )
    if not options.get("do_lower_case", True):
        raise UserError(f"{folder / OPTIONS} sets do_lower_case to false, which is not supported; expected true.")
    if str(options.get("tokenizer_class")).startswith(("Gemma", "Siglip2")) and cleaning == "canonical":
        cleaning = "lower"
    model.post_processor = processors.Sequence([])
    content = tokenizer.with_conventions(model.to_str(), end=end, pad=pad, size=size, cleaning=cleaning)
    made = storage.cache_dir() / "tokenizers" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        write_whole(epath.Path(made), content)
    return str(made)


def _library_tokenizer(file: epath.Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as error:  # The library raises bare `Exception`.
        raise UserError(f"{file} is not a Hugging Face tokenizers JSON: {error}") from error


def _token(value: Any) -> str | None:
    """A token of tokenizer_config.json, which may be a dict of its content and options."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _is_clips(vocabulary: Any) -> bool:
    """Whether a dict of ids by words has CLIP's words; start and end, which have several spellings, are ignored."""
    if not isinstance(vocabulary, dict):
        return False
    return all(vocabulary.get(word) == i for i, word in enumerate(tokenizer.clip_vocabulary()[0]))


def clip_files(length: int) -> dict[str, str]:
    """Return {file: content} of CLIP's tokenizer for transformers, for texts of `length` tokens."""
    words, merges = tokenizer.clip_vocabulary()
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    return {
        CLIP_FILES[0]: json.dumps({word: i for i, word in enumerate([*words, start, end])}, ensure_ascii=False),
        CLIP_FILES[1]: "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        OPTIONS: json.dumps(options, indent=2) + "\n",
        SPECIAL: json.dumps(special, indent=2) + "\n",
    }


def own_files(path: str, length: int) -> dict[str, str]:
    """Return {file: content} of a tokenizer for transformers, and open_clip through it, with the same ids as here.

    The tokenizer here adds start, end and padding itself and reads special tokens in a text as text; for the other
    projects the files set that.

    Args:
      path: of a tokenizer file that `tokenizer.load` reads.
      length: tokens of a text.
    """
    ours = tokenizer.load(path)
    if ours.cleaning:
        raise UserError(f"{path} is SigLIP's tokenizer, which other formats cannot express; write to 'safetensors'.")
    model = _read(path)
    model.no_padding()
    model.no_truncation()

    def token(i: int) -> str:
        if (text := model.id_to_token(i)) is None:
            raise UserError(f"{path} has no token of id {i}; repair the file.")
        return text

    start, end = [] if ours.sot_id is None else [token(ours.sot_id)], token(ours.eot_id)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*start, "$A", end], special_tokens=[(text, model.token_to_id(text)) for text in (*start, end)]
    )
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "padding_side": "right",
        "truncation_side": "right", "split_special_tokens": True, "clean_up_tokenization_spaces": False,
        **({"bos_token": start[0]} if start else {}), "eos_token": end, "pad_token": token(padding(ours)),
    }  # fmt: skip
    return {FILE: model.to_str(), OPTIONS: json.dumps(options, indent=2) + "\n"}


def _read(path: str) -> tokenizers.Tokenizer:
    # Not by the library's `from_file`, which knows local disks alone.
    return tokenizers.Tokenizer.from_str(epath.Path(path).read_text())


def padding(tokens: tokenizer.Tokenizer) -> int:
    """Return the id to pad with in other projects: the padding token's if there is one, else the end's, as for CLIP.

    Towers read no token after the first end, so both give the same embeddings.
    """
    if tokens.name in tokenizer.NAMES:
        return tokens.eot_id
    token = _read(tokens.name).id_to_token(tokens.pad_id)
    return tokens.pad_id if token in tokenizer.PAD_TOKENS else tokens.eot_id
