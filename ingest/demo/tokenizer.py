"""The tokenizer of the demo model.

In: training documents. Out: a byte-level BPE tokenizer, as a Hugging Face fast tokenizer, and token
arrays of the documents of a domain.
"""

from random import Random

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moewh.ingest.demo.corpus import DOMAINS, Document
from moewh.ingest.demo.heldout import Tokens

END = "<|endoftext|>"  # begins, ends and pads
CONTEXT = 1024  # tokens
CHARACTERS = 400_000  # per domain, so that the largest does not dominate the merges


def train_tokenizer(training: list[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single digits, which puts `<|endoftext|>` before every text."""
    texts = []
    for domain in DOMAINS:
        found = [document.text for document in training if document.domain == domain]
        Random(0).shuffle(found)  # documents with adjacent names are similar
        texts.append("".join(found)[:CHARACTERS])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, bpe.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, found: list[Document], domain: str) -> list[Tokens]:
    """Return the tokens of each document of a domain, `<|endoftext|>` first."""
    texts = [document.text for document in found if document.domain == domain]
    return [np.array(encoding.ids, dtype=np.int64) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
