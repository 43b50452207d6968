"""A fast tokenizer from a `tokenizer.json` or from the sentencepiece files of a checkpoint.

No code of a checkpoint is ever executed: `auto_map` entries are ignored. Token ids equal those of
the released slow tokenizer, and so does the decoded text, bytes that are not UTF-8 included.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from mono_internvl.errors import CheckpointError, PromptError
from mono_internvl.processing.prompts import CHAT_TOKENS, VISUAL_TOKENS
from mono_internvl.processing.sentencepiece import (
    DecodingTable,
    convert_sentencepiece,
    decode_pieces,
    decoding_table,
)
from mono_internvl.runs.files import MAX_TOKENIZER_BYTES, read_bytes, read_json, reading

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
# Written back unchanged. The special tokens map is not: tokenizer.json holds what it says, and
# hosts of today fail on its old form.
_KEPT_FILES = (SENTENCEPIECE_MODEL, ADDED_TOKENS)

_NAMED_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "</s>",
}
_TRIAL = " A word, 12 34\n\tnaïve \u4e2d\u6587 \U0001f600"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


@dataclass(frozen=True)
class PlainEncoding:
    """Ids of a text in which nothing counts as a control token.

    Attributes:
        ids: Token ids.
        spans: For each token the characters (start, end) of the text that it covers.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class MonoInternVLTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer that decodes as sentencepiece does and can encode text without control tokens.

    Control tokens are the special added tokens; they are looked up by name, never by number.

    Source: tokenizer of the released checkpoints. Differs: decoding with control tokens kept puts
    no spaces around them, so that encoding and decoding are inverse.
    """

    padding_side = "left"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._plain: dict[bool, Tokenizer] = {}
        self._table: DecodingTable | None = None
        self._control: dict[str, int] | None = None
        self._kept_files: dict[str, bytes] = {}
        self._kept_length = -1
        super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `load_tokenizer`; options that do not locate files are ignored."""
        return load_tokenizer(
            pretrained_model_name_or_path, **{k: v for k, v in kwargs.items() if k in HUB_OPTIONS}
        )

    @property
    def control_tokens(self) -> dict[str, int]:
        """Every special token and its id, `<s>` to `</box>`."""
        if self._control is None:
            added = self.backend_tokenizer.get_added_tokens_decoder()
            self._control = {t.content: index for index, t in added.items() if t.special}
        return self._control

    def control_id(self, token: str) -> int:
        """Id of a control token by name.

        Raises:
            CheckpointError: If the vocabulary has no such control token.
        """
        index = self.control_tokens.get(token)
        if index is None:
            raise CheckpointError(
                f"tokenizer has no control token {token!r}; known: "
                f"{', '.join(self.control_tokens)}; "
                "use the checkpoint's own tokenizer or add_special_vocabulary"
            )
        return index

    def encode_plain(self, text: str, *, continues: bool = False) -> PlainEncoding:
        """Encodes text in which the names of control tokens are just characters.

        For text without such names the ids are those of ordinary encoding.

        Args:
            text: Any text.
            continues: Whether something stands before it. A vocabulary that marks the start of the
                first word of a text, and of that one only (Metaspace, "first"), then marks none.

        Returns:
            Ids and character spans; no BOS.

        Raises:
            PromptError: If the text cannot be encoded in UTF-8 (a lone surrogate), or the
                vocabulary spells a control token as ordinary text (sentencepiece's never do).
        """
        if not self._plain:
            fields = self.backend_tokenizer.to_str()
            within = fields.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
            first = _plain_tokenizer(fields)
            self._plain = {
                False: first,
                True: first if within == fields else _plain_tokenizer(within),
            }
        try:
            encoding = self._plain[continues].encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise PromptError(
                f"text: {text[:40]!r} is not a Unicode string ({error}); "
                "decode it with errors='replace'"
            ) from error
        reserved = set(self.control_tokens.values()) - {self.unk_token_id}
        if not reserved.isdisjoint(encoding.ids):
            raise PromptError(
                "text: this vocabulary encodes the name of a control token as the token itself; "
                "remove control tokens from the text"
            )
        return PlainEncoding(encoding.ids, encoding.offsets)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Writes `tokenizer.json` and its settings, and `tokenizer.model` if there was one.

        The sentencepiece files are left out once the vocabulary has grown beyond them.

        Returns:
            Paths of the files written.
        """
        names = tuple(super().save_pretrained(save_directory, *args, **kwargs))
        folder = Path(save_directory)
        settings_path = folder / TOKENIZER_CONFIG
        settings = json.loads(settings_path.read_text(encoding="utf-8"))
        settings.pop("auto_map", None)
        # Hosts without this package then load the file as an ordinary fast tokenizer, same ids.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings_path.write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if len(self) != self._kept_length:
            return names
        for name, data in self._kept_files.items():
            (folder / name).write_bytes(data)
        return names + tuple(str(folder / name) for name in self._kept_files)

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a text that begins with BOS gets no second one.

        A rendered chat template brings its own; in a batch the texts without get theirs here.
        """
        texts = [text] if isinstance(text, str) else text
        is_plain = kwargs.get("split_special_tokens") or not kwargs.get("add_special_tokens", True)
        bos = None if is_plain else self.bos_token
        if bos and all(isinstance(one, str) for one in texts):
            has_bos = [one.startswith(bos) for one in texts]
            if any(has_bos) and self._adds_bos():
                kwargs["add_special_tokens"] = False
                texts = [one if has else bos + one for one, has in zip(texts, has_bos, strict=True)]
                text = texts[0] if isinstance(text, str) else texts
        return super()._encode_plus(text, *args, **kwargs)

    def _adds_bos(self) -> bool:
        processor = self.backend_tokenizer.post_processor
        return processor is not None and processor.num_special_tokens_to_add(False) > 0

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        self._table = self._control = None
        self._plain = {}
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        if self._table is None:
            self._table = decoding_table(self.backend_tokenizer)
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if not self._table.data:  # not a vocabulary of sentencepiece's kind
            return super()._decode(
                ids, skip_special_tokens, clean_up_tokenization_spaces=clean_up_tokenization_spaces
            )
        return decode_pieces(ids, self._table, skip_special_tokens)


def add_special_vocabulary(tokenizer: MonoInternVLTokenizer) -> int:
    """Adds the chat and visual control tokens that a language model's tokenizer lacks, in order.

    Returns:
        How many were added; the model's embeddings grow by as many rows.
    """
    known = tokenizer.control_tokens
    missing = [token for token in (*CHAT_TOKENS, *VISUAL_TOKENS) if token not in known]
    added = [AddedToken(token, special=True, normalized=False) for token in missing]
    return tokenizer.add_tokens(added, special_tokens=True) if added else 0


def load_tokenizer(path: str | Path, **hub_options: Any) -> MonoInternVLTokenizer:
    """Loads the tokenizer of a checkpoint folder or hub id.

    `tokenizer.json` is read if present. Otherwise the sentencepiece model and the added tokens of a
    released checkpoint are converted.

    Args:
        path: Folder or hub id.
        **hub_options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`,
            `subfolder`.

    Returns:
        The tokenizer: BOS in front, no EOS, padding left.

    Raises:
        CheckpointError: If neither file is there, the files contradict one another, are damaged, or
            make a tokenizer that cannot encode.
    """
    with reading(f"{path}: tokenizer files"):
        tokenizer = _load_tokenizer(path, hub_options)
        # Some damage shows only in use: better here than in the middle of a run.
        tokenizer.decode(tokenizer.encode_plain(_TRIAL).ids)
        tokenizer(_TRIAL)
        return tokenizer


def _load_tokenizer(path: str | Path, hub_options: dict[str, Any]) -> MonoInternVLTokenizer:
    files = {
        name: find_file(path, name, hub_options)
        for name in (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, *_KEPT_FILES)
    }
    settings = read_json(files[TOKENIZER_CONFIG])
    special_map = read_json(files[SPECIAL_TOKENS_MAP])
    named = {
        key: _content(token)
        for key, default in _NAMED_TOKENS.items()
        if (token := settings.get(key, special_map.get(key, default))) is not None
    }
    kept = {
        name: read_bytes(found, MAX_TOKENIZER_BYTES)
        for name in _KEPT_FILES
        if (found := files[name]) is not None
    }
    if (json_file := files[TOKENIZER_JSON]) is not None:
        backend = _read_tokenizer_json(json_file)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        named = {key: token for key, token in named.items() if token in vocabulary}
    elif SENTENCEPIECE_MODEL in kept:
        added = _released_added_tokens(settings, read_json(files[ADDED_TOKENS]), special_map, named)
        backend = convert_sentencepiece(
            kept[SENTENCEPIECE_MODEL],
            added,
            bos_token=named.get("bos_token") if settings.get("add_bos_token", True) else None,
        )
    else:
        raise CheckpointError(
            f"{path}: neither {TOKENIZER_JSON} nor {SENTENCEPIECE_MODEL}; expected the tokenizer "
            "files beside config.json, copy them from the checkpoint"
        )
    tokenizer = MonoInternVLTokenizer(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length", int(1e30)),
        **named,
    )
    if SENTENCEPIECE_MODEL in kept:
        tokenizer._kept_files = kept
        tokenizer._kept_length = len(tokenizer)
    return tokenizer


def _read_tokenizer_json(file: Path) -> Tokenizer:
    with reading(f"{file}: not a readable tokenizer"):
        return Tokenizer.from_buffer(read_bytes(file, MAX_TOKENIZER_BYTES))


def _released_added_tokens(
    settings: dict[str, Any],
    added: dict[str, int],
    special_map: dict[str, Any],
    named: dict[str, str],
) -> dict[int, AddedToken]:
    """Added tokens by id, from the three files in which a released tokenizer declares them."""
    declared = {
        _content(token)
        for source in (settings, special_map)
        for token in source.get("additional_special_tokens") or ()
    }
    special = declared | set(named.values()) | set(CHAT_TOKENS) | set(VISUAL_TOKENS)
    out = {
        index: AddedToken(token, special=token in special, normalized=False)
        for token, index in added.items()
    }
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        other = out.get(int(index))
        if other is not None and other.content != token["content"]:
            raise CheckpointError(
                f"token id {index} is {other.content!r} in {ADDED_TOKENS} but {token['content']!r} "
                f"in {TOKENIZER_CONFIG}; expected one name, restore the checkpoint's own files"
            )
        flags = {key: bool(token.get(key, False)) for key in ("lstrip", "rstrip", "single_word")}
        is_special = bool(token.get("special", False)) or token["content"] in special
        out[int(index)] = AddedToken(
            token["content"], special=is_special, normalized=False, **flags
        )
    if not settings.get("added_tokens_decoder"):
        # Before these were declared, the first three ids were fixed by sentencepiece itself.
        for index, token in enumerate(("<unk>", "<s>", "</s>")):
            out.setdefault(index, AddedToken(token, special=True, normalized=False))
    return out


def find_file(path: str | Path, name: str, hub_options: dict[str, Any]) -> Path | None:
    """A file of a folder or of a hub id, None if there is none."""
    if Path(path).is_dir():
        file = Path(path) / str(hub_options.get("subfolder") or "") / name
        return file if file.is_file() else None
    try:
        found = cached_file(
            str(path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_options,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no such folder, and not to be had from the hub ({error}); "
            "expected a checkpoint folder or a hub id"
        ) from error
    return Path(found) if found is not None else None


def _plain_tokenizer(fields: str) -> Tokenizer:
    """A tokenizer to which the names of control tokens are text."""
    plain = Tokenizer.from_str(fields)
    plain.encode_special_tokens = True
    return plain


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)
