"""Real text: tokenise once, read forever.

    source = PythonSource()                                   # or TextFiles("folder")
    corpus = prepare(source, TokenizerOptions("bpe", vocab_size=4096), "data/corpora")
    windows = training_windows(corpus, seed=42, start=0, count=8, length=1024)     # int64 [8, 1025]
    corpus.split("val").windows(np.arange(8), 1024)

Needs numpy, numba, tokenizers and, for parquet, pyarrow; no torch.
"""

from src.datamodules.corpora.corpus import Corpus, TokenStream, training_indices, training_windows
from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.sources import Document, PythonSource, Source, TextFiles
from src.datamodules.corpora.splits import SPLITS
from src.datamodules.corpora.store import corpus_identity, prepare
from src.datamodules.corpora.tokenizer import Tokenizer, TokenizerOptions

__all__ = [
    "SPLITS",
    "Corpus",
    "CorpusError",
    "Document",
    "PythonSource",
    "Source",
    "TextFiles",
    "TokenStream",
    "Tokenizer",
    "TokenizerOptions",
    "corpus_identity",
    "prepare",
    "training_indices",
    "training_windows",
]
