"""The tokenizers of the tests of data, in which answers are written too."""

from tests.data.conftest import _train_sentencepiece, _write_folder, byte_level, small_spm

__all__ = ["_train_sentencepiece", "_write_folder", "byte_level", "small_spm"]
