"""Data: from files to the stream of Batches that training reads. The files of this folder in the order of the work:

    rows, jsonl, samples          a file's rows, or a list's
    fields, formats, conversations    which fields a row has -> Sample: segments of text, or a chat
    tokenizer, tokenizer_files, tokenizer_backends, tokenizer_writer    texts to ids
    chat, template, template_process, template_child, spans, mask   a chat rendered, and what of it is trained
    segments, encode              Sample -> ids with flags, in chunks
    read, corpus, cache           a whole file of them as flat arrays, kept for the next run
    ledger, account, glued        where each token went, and what to know of it
    pieces, document, packing, batch      documents packed into rows of T tokens
    stream, holdout               the epochs of it all, and what is held out of them
"""

from minitune.data.batch import IGNORED, Batch
from minitune.data.document import Document
from minitune.data.holdout import split_off, streams
from minitune.data.ledger import Ledger
from minitune.data.packing import pack
from minitune.data.stream import Stream, stream
from minitune.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["IGNORED", "Batch", "Document", "Ledger", "Stream", "Tokenizer", "load_tokenizer", "pack", "split_off",
           "stream", "streams"]
