"""Train the embedded demo model: `python -m moewh.ingest.demo.train [--out DIR] [--steps N]`.

In: the text of `moewh.ingest.demo.corpus`. Out, in DIR (default: this folder): `model/step-NNNNNN/`, three
checkpoints of one small OLMoE, each a Hugging Face folder in bf16 with its tokenizer, and
`training.json`, which records the recipe, the text's digests and the held-out losses. It takes about ten
minutes on two CPU cores. The same machine, Python and versions give the same bytes.

Shapes: B windows of a batch, S positions, T tokens, E experts.
"""

import argparse
import copy
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from moewh.ingest.demo import FOLDER
from moewh.ingest.demo.corpus import DOMAINS, Document, digests, documents, split
from moewh.ingest.demo.heldout import Tokens, bigram_loss, model_loss, windows
from moewh.ingest.demo.tokenizer import CONTEXT, encode, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result except the text and the versions; recorded in `training.json`."""

    steps: int = 2000
    windows_per_domain: int = 2  # in each batch, so that all domains have equal weight
    window: int = 256  # tokens
    learning_rate: float = 3e-3  # the peak; linear warm-up, then a cosine to a hundredth of it
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.1
    router_aux_loss_coef: float = 0.01
    vocabulary: int = 1536
    held_out_windows: int = 128  # of each domain, at most
    seed: int = 0
    threads: int = 2

    @property
    def checkpoint_steps(self) -> list[int]:
        """Return an early, a middle and the final step."""
        return sorted({max(1, self.steps // 50), max(1, self.steps // 5), self.steps})

    @property
    def step_tokens(self) -> int:
        """Return the number of tokens in a batch."""
        return len(DOMAINS) * self.windows_per_domain * self.window


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: this one)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (default: %(default)s)")
    arguments = parser.parse_args()
    train(arguments.out, Recipe(steps=arguments.steps))


def train(out: Path, recipe: Recipe) -> None:
    """Write `model/` and `training.json` into the folder `out`, replacing its content."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    found = documents()
    training, held_out = split(found)
    tokenizer = train_tokenizer(training, recipe.vocabulary)
    streams = {d: np.concatenate(encode(tokenizer, training, d)) for d in DOMAINS}
    model = build_model(tokenizer, recipe)
    for step in optimize(model, streams, tokenizer.bos_token_id, recipe):
        if step in recipe.checkpoint_steps:
            folder = checkpoint_folder(out, step)
            copy.deepcopy(model).bfloat16().save_pretrained(folder)
            (folder / "model.safetensors").chmod(0o644)  # it is written with permissions for its owner only
            tokenizer.save_pretrained(folder)
    remove_others(out, recipe)
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": asdict(recipe),
        "versions": versions(),
        "text_sha256": digests(found),
        **losses(out, tokenizer, training, held_out, recipe),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def checkpoint_folder(out: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return out / "model" / f"step-{step:06d}"


def remove_others(out: Path, recipe: Recipe) -> None:
    """Remove checkpoints of an earlier training with other steps, so that the folder holds one series."""
    written = {checkpoint_folder(out, step) for step in recipe.checkpoint_steps}
    for folder in set((out / "model").glob("step-*")) - written:
        shutil.rmtree(folder)


def versions() -> dict[str, str]:
    """Return the versions that the bytes of the result depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


# --- model --------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> OlmoeForCausalLM:
    """Build an OLMoE of 4 layers with 16 experts each, 4 per token, in fp32, initialised from the seed."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # The padding row of an embedding stays zero, and here that would be the first token's row.
        pad_token_id=None,
    )
    model = OlmoeForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def optimize(model: OlmoeForCausalLM, streams: dict[str, Tokens], start: int, recipe: Recipe) -> Iterator[int]:
    """Train the model in place and yield the number of each finished step."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    batches = batch_stream(streams, start, recipe)
    began = time.monotonic()
    model.train()
    for step in range(1, recipe.steps + 1):
        loss, balance = step_losses(model, next(batches))
        (loss + recipe.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == recipe.steps:
            seconds = time.monotonic() - began
            print(f"step {step}  loss {loss:.3f}  balance {balance:.3f}  {seconds:.0f} s", flush=True)
        yield step


def rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step (0-based) as a share of the peak."""
    warmup_steps = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, recipe.steps - warmup_steps)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


def batch_stream(streams: dict[str, Tokens], start: int, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield batches [B, S] of windows at random offsets, equally many per domain, each after a start token."""
    rng = np.random.default_rng(recipe.seed)
    size, count = recipe.window - 1, recipe.windows_per_domain
    while True:
        rows = []
        for stream in streams.values():
            rows += [stream[at : at + size] for at in rng.integers(0, len(stream) - size, count)]
        rows_BS = torch.from_numpy(np.stack(rows))
        yield torch.cat([torch.full((len(rows), 1), start), rows_BS], dim=1)


def step_losses(model: OlmoeForCausalLM, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (next-token loss, load-balancing loss); the second is top-k, here 4, if all experts are used equally.

    The model's own sum pools the layers, so that an idle expert in one layer could be offset in another;
    here each layer is balanced by itself, with the model's own formula.
    """
    out = model(input_ids=ids_BS, use_cache=False, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
    config = model.config
    per_layer = [
        torch.as_tensor(load_balancing_loss_func((logits_TE,), config.num_experts, config.num_experts_per_tok))
        for logits_TE in out.router_logits
    ]
    return loss, torch.stack(per_layer).mean()


# --- held-out losses ----------------------------------------------------------------------------


def losses(
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    training: list[Document],
    held_out: list[Document],
    recipe: Recipe,
) -> dict[str, Any]:
    """Return, per checkpoint and domain, the tokens and the held-out losses in nats per token."""
    start = tokenizer.bos_token_id
    domains: dict[str, dict[str, float]] = {}
    windows_of: dict[str, Tokens] = {}
    for domain in DOMAINS:
        fitted = encode(tokenizer, training, domain)
        stream = np.concatenate(encode(tokenizer, held_out, domain))
        windows_of[domain] = windows(stream, recipe.window, recipe.held_out_windows)
        bigram, discount = bigram_loss(fitted, windows_of[domain], len(tokenizer))
        domains[domain] = {
            "training_tokens": sum(map(len, fitted)),
            "held_out_tokens": windows_of[domain][:, 1:].size,
            "bigram_loss": round(bigram, 4),
            "bigram_discount": discount,
        }
    checkpoints: dict[str, dict[str, Any]] = {}
    for step in recipe.checkpoint_steps:
        folder = checkpoint_folder(out, step)
        model = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        checkpoints[folder.name] = {
            "train_step": step,
            "train_tokens": step * recipe.step_tokens,
            "held_out_loss": {d: round(model_loss(model, windows_of[d], start), 4) for d in DOMAINS},
        }
    final = checkpoint_folder(out, recipe.steps).name
    for domain in DOMAINS:
        domains[domain]["loss"] = checkpoints[final]["held_out_loss"][domain]
    return {"domains": domains, "checkpoints": checkpoints}


if __name__ == "__main__":
    main()
