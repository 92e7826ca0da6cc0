"""Small tokenizers of the kinds that real models have, trained in a blink."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello there, how are you today?\n\nI am fine. Thank you very much!",
    "Human: What is it? Assistant: It is a test of the tokenizer.\n",
    "User: Tell me a story.\n\nAssistant: Once upon a time, there was a test.",
    "### Instruction:\nWrite the answer.\n\n### Response:\nThe answer is 42.\n\n",
    "system user assistant model tool You are a helpful assistant.\n",
    "a < b | c > d _ e / f [ g ] h: i; j, k! l? m' n\" o# p0 1 3 5 6 7 8 9 z Z q Q x X B C D E F G J K L M N P R S V Y",
] * 4

BOS, EOS = "<s>", "</s>"


def _wrap(
    backend: Tokenizer, special: Sequence[str | AddedToken], template: str | None
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([BOS, EOS, *special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token="<unk>", chat_template=template
    )


@cache
def _byte_level_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<unk>"])
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


def byte_level(
    special: Sequence[str | AddedToken] = (), template: str | None = None, *, nfc: bool = False
) -> PreTrainedTokenizerFast:
    """Like GPT-2, Llama 3 and Qwen: bytes, no space is ever added."""
    backend = Tokenizer.from_str(_byte_level_json())
    if nfc:
        backend.normalizer = normalizers.NFC()
    return _wrap(backend, special, template)


def metaspace(
    special: Sequence[str | AddedToken] = (), template: str | None = None, *, scheme: str = "first"
) -> PreTrainedTokenizerFast:
    """Like Llama 2 and Mistral: a space is put before the text (`first`), or before every piece of it (`always`)."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback()])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"]))
    tree = json.loads(backend.to_str())
    vocab = tree["model"]["vocab"]
    vocab |= {f"<0x{i:02X}>": len(vocab) + i for i in range(256)}
    tree["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return _wrap(Tokenizer.from_str(json.dumps(tree)), special, template)


def unigram(special: Sequence[str | AddedToken] = (), template: str | None = None) -> PreTrainedTokenizerFast:
    """Like T5 and XLM-R: a unigram model whose vocabulary holds the special tokens as pieces."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    pieces = [str(token) for token in special]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", BOS, EOS, *pieces], unk_token="<unk>"
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend, special, template)
