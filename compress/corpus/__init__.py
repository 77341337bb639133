"""Corpus: texts become token ids for calibration, fixed by a seed.

Order. A source's documents are drawn uniformly without replacement. The order is a Fisher-Yates shuffle by SHA-256 of the
seed, the source's content and a counter, so it is the same on any machine, and no source disturbs another: with more samples,
or beside other sources, it goes on where it stood. The samples of all sources are shuffled into one another at the end.

Packing. `concatenate` joins documents and cuts the stream into windows: every token is one that counts. Of a document that is
longer than a sample a part of that length is taken, and another only when every document has given one. `pad` takes one
document for each sample. Between texts stands EOS where the tokenizer has one (`join`), as in pretraining; conversations end
as their template ends them. Each sample of these two begins with what the tokenizer puts before a text by itself (`bos`),
nowhere else: that is how the model runs, and the first position, where attention sinks, is then the one that it meets in use.
For conversations the template decides. `documents`, for training, cuts the same stream, but keeps its texts apart: a tensor
`position_ids` begins at 0 with each document or part, whose EOS is its last token, and with each window. What the end of a
window cuts off is a text by itself in the next. So every text, not only every sample, begins with what the tokenizer puts
there. Attention must not reach back over a 0.

Imports errors, checkpoint.
"""

from compress.corpus.build import Corpus, SourceRecord, build_for
from compress.corpus.build import build_corpus as build
from compress.corpus.spec import CorpusSpec, shares

__all__ = ["Corpus", "CorpusSpec", "SourceRecord", "build", "build_for", "shares"]
