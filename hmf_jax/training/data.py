"""The names of `batches`, `documents` and `encode`, which were this one file."""

from hmf_jax.training.batches import Batches, Piece
from hmf_jax.training.documents import COLUMNS, Document, Documents
from hmf_jax.training.encode import encode_chat, encode_text

__all__ = [
    "COLUMNS",
    "Batches",
    "Document",
    "Documents",
    "Piece",
    "encode_chat",
    "encode_text",
]
