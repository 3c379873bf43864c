"""Fast tokenizers of Hugging Face: transformers' wrapper, and the backend that does the work."""

from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from data_pipelines.errors import DataError
from data_pipelines.shards.sample import MAX_CAPTION_BYTES


def load_wrapper(path: Path):
    from transformers import AutoTokenizer  # takes seconds, and most runs use sentencepiece

    try:
        # Told not to, it refuses a tokenizer that brings code of its own; asked nothing, it would ask on the terminal.
        wrapper = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        backend = wrapper.backend_tokenizer
        if isinstance(backend.model, models.WordPiece):  # longer words, of 100 as saved, become one unknown piece
            backend.model.max_input_chars_per_word = MAX_CAPTION_BYTES
        return wrapper, backend
    except Exception as error:  # of a file that it cannot open or parse, the backend raises a bare Exception
        raise DataError(
            f"{path} holds no Hugging Face tokenizer with a tokenizer.json ({type(error).__name__}): save one "
            f"there with `save_pretrained`."
        ) from None


def template(backend: Backend, cls: str, sep: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
