"""
Train the pair of models that `hf-osd demo` ships with: about an hour on two CPU cores.

The target (10M parameters) reads documented functions of Python's standard library (PSF licence), taken from the
Python that runs this script, and gsm8k (MIT licence). The draft (1M parameters) reads gsm8k only: it is generic, and
has never seen the demo's domain. Docstrings that `hf_osd.evaluation.prompts.is_held_out` keeps back reach neither.

    python examples/train_demo_pair.py --gsm8k openai/gsm8k --output hf_osd/demo/pair
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_osd.evaluation.prompts import INSTRUCTION, is_held_out, stdlib_functions

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
    "<|assistant|>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BLOCK = 256  # tokens a packed training sequence
VOCABULARY = 4096
SHAPES = {
    "target": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=12, head_dim=64),
    # One wide layer: what a draft costs is its depth (Decoding Speculative Decoding, https://arxiv.org/abs/2402.01528).
    "draft": dict(hidden_size=192, intermediate_size=512, num_hidden_layers=1, head_dim=48),
}


def code_conversations() -> list[dict[str, str]]:
    """Return docstring-to-function pairs of the running Python, without the held-out ones."""
    pairs = [(doc, source) for doc, source in stdlib_functions() if not is_held_out(doc)]
    return [{"prompt": INSTRUCTION + doc, "response": source} for doc, source in pairs]


def maths_conversations(source: str) -> list[dict[str, str]]:
    """Return gsm8k's training rows from a `datasets` id or from a JSON Lines file of prompt and response."""
    if Path(source).is_file():
        rows = load_dataset("json", data_files=source, split="train")
    else:
        rows = load_dataset(source, "main", split="train")
        rows = rows.rename_columns({"question": "prompt", "answer": "response"})
    return [{"prompt": row["prompt"], "response": row["response"]} for row in rows]


def train_tokenizer(conversations: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Train one byte-level BPE tokenizer for both models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((row["prompt"] + "\n" + row["response"] for row in conversations), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def pack(conversations: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, epochs: int) -> Dataset:
    """Join the shuffled conversations of every epoch into one stream, and cut it into blocks."""
    encoded = [
        tokenizer.encode(f"<bos><|user|>{row['prompt']}<|assistant|>{row['response']}<eos>") for row in conversations
    ]
    stream: list[int] = []
    for epoch in range(epochs):
        random.Random(epoch).shuffle(encoded)
        stream.extend(token for row in encoded for token in row)
    blocks = [stream[start : start + BLOCK] for start in range(0, len(stream) - BLOCK, BLOCK)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def train_model(name: str, blocks: Dataset, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Train one model from scratch on packed blocks, and save it in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPES[name],
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(output / f"{name}-checkpoints"),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=60,
        weight_decay=0.05,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    print(f"{name}: {model.num_parameters():,} parameters, {len(blocks) * BLOCK:,} tokens", flush=True)
    Trainer(model=model, args=arguments, train_dataset=blocks, data_collator=default_data_collator).train()
    model.to(torch.bfloat16).save_pretrained(output / name)
    tokenizer.save_pretrained(output / name)


def main() -> None:
    """Build the corpus, train the tokenizer, then the draft and the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", default="openai/gsm8k", help="a datasets id, or a .jsonl of prompt and response")
    parser.add_argument("--output", type=Path, default=Path("hf_osd/demo/pair"), help="folder for target/ and draft/")
    parser.add_argument("--epochs", type=int, default=5, help="passes of the target over its corpus")
    options = parser.parse_args()

    maths, code = maths_conversations(options.gsm8k), code_conversations()
    tokenizer = train_tokenizer(maths + code)
    train_model("draft", pack(maths, tokenizer, 2), tokenizer, options.output)
    train_model("target", pack(maths + code, tokenizer, options.epochs), tokenizer, options.output)


if __name__ == "__main__":
    main()
