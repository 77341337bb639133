"""Corpus: texts become token ids for calibration, fixed by a seed.

Order. A source's documents are drawn uniformly without replacement. The order is a Fisher-Yates shuffle by SHA-256 of the
seed, the source's content and a counter, so it is the same on any machine. Sources do not affect each other: with more samples,
or with other sources, the same documents are drawn first. In the end the samples of all sources are shuffled together.

Packing. `concatenate` joins documents and cuts the stream into windows, so no token is padding. From a document that is longer
than a sample one part of that length is taken, and another only after every document has given one. `pad` takes one document
for each sample. EOS separates texts if the tokenizer has one (`join`), as in pretraining; conversations end as their chat
template ends them. Each sample of these two packings begins with the prefix that the tokenizer puts before a text (`bos`), and
has it nowhere else: a model in use sees the same first position, where attention sinks form. For conversations the template
decides. `documents`, for training, cuts the same stream but keeps its texts apart: a tensor `position_ids` begins at 0 with
each document or part (EOS is its last token) and with each window. The rest of a text that a window's end cuts off is a text
of its own in the next window. So every text, not only every sample, begins with the tokenizer's prefix. Attention must not
cross a position of 0.

Domains. Where each source is a domain whose loss is measured, some of its documents are held out: none of a held-out document is
trained on. Tensors `domain` and `held_out` say of each sample which source it is from, and which part.

Imports errors, checkpoint.
"""

from compress.corpus.build import Corpus, SourceRecord, build_for
from compress.corpus.build import build_corpus as build
from compress.corpus.domains import build_domains, domain_names
from compress.corpus.spec import CorpusSpec, DomainSpec, shares

__all__ = ["Corpus", "CorpusSpec", "DomainSpec", "SourceRecord", "build", "build_domains", "build_for", "domain_names", "shares"]
