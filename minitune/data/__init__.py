"""Data: tokenizers, sample formats, packing, and the stream of Batches that training reads."""

from minitune.data.batch import IGNORED, Batch
from minitune.data.document import Document
from minitune.data.holdout import split_off, streams
from minitune.data.ledger import Ledger
from minitune.data.packing import pack
from minitune.data.stream import Stream, stream
from minitune.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["IGNORED", "Batch", "Document", "Ledger", "Stream", "Tokenizer", "load_tokenizer", "pack", "split_off",
           "stream", "streams"]
