"""Command: `python -m puzzle_dag.pretrain conf/pretrain/tiny.yaml --out parents/tiny`."""

import argparse
import itertools
import json
import logging
import random
from pathlib import Path

import torch

from puzzle_dag.corpus.mixture import mix_tokens, skill_lines
from puzzle_dag.corpus.skills import build_skills
from puzzle_dag.corpus.stdlib import python_version, read_stdlib
from puzzle_dag.corpus.tokenizer import load_tokenizer, train_tokenizer
from puzzle_dag.corpus.world import build_world
from puzzle_dag.pretrain.bars import ffn_pruning_kl, grade_skills
from puzzle_dag.pretrain.card import write_card
from puzzle_dag.pretrain.recipe import read_recipe
from puzzle_dag.pretrain.train import train_parent
from puzzle_dag.store import write_atomically

_LINE_BATCHES_FOR_TOKENIZER = 400
_HELDOUT_TOKENS = 16_384


def main() -> None:
    """Train, resuming where a former run stopped; save the checkpoint in bf16 and the measured bars beside it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--work", type=Path, default=Path("var/pretrain"), help="folder of the resumable state")
    args = parser.parse_args()
    recipe = read_recipe(args.recipe)
    skills = build_skills(build_world(recipe.world_seed))
    if not (args.out / "tokenizer.json").exists():
        lines = itertools.islice(skill_lines(skills, random.Random(recipe.seed)), _LINE_BATCHES_FOR_TOKENIZER)
        texts = itertools.chain((line for batch in lines for line in batch), (text for _, text in read_stdlib("train")))
        tokenizer = train_tokenizer(texts, recipe.shape.vocab_size)
        tokenizer.model_max_length = recipe.shape.max_length
        tokenizer.save_pretrained(args.out)
    tokenizer = load_tokenizer(args.out)
    model, curve = train_parent(recipe, tokenizer, args.work / recipe.name)
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    rows = mix_tokens(
        tokenizer,
        skills,
        num_tokens=_HELDOUT_TOKENS,
        row_length=recipe.row_length,
        skill_share=recipe.skill_share,
        split="heldout",
        seed=recipe.seed,
    )
    record = {
        "recipe": recipe.model_dump(),
        "python_version": python_version(),
        "torch_version": torch.__version__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "accuracy": grade_skills(model, tokenizer, skills, 500),
        "ffn_pruning_kl": {str(k): ffn_pruning_kl(model, torch.from_numpy(rows).long(), k) for k in (0.25, 0.1)},
    }
    write_atomically(args.out / "training.json", json.dumps(record, indent=1))
    write_atomically(args.out / "README.md", write_card(record, f"python -m puzzle_dag.pretrain {args.recipe} --out {args.out}"))


if __name__ == "__main__":
    main()
