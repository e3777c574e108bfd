"""The model card of a bundled parent, written from the record of its training and from nothing else."""

from typing import Any


def write_card(record: dict[str, Any], command: str) -> str:
    """Return the card as Markdown: data, seed, tokens, losses, time, command and the two bars, all from `record`."""
    recipe, curve = record["recipe"], record["curve"]
    shape = recipe["shape"]
    losses = "\n".join(f"| {int(p['step'])} | {int(p['tokens']):,} | {p['loss']:.3f} | {p['seconds'] / 60:.1f} |" for p in curve)
    skills = "\n".join(f"| {name} | {accuracy:.3f} |" for name, accuracy in record["accuracy"].items())
    pruning = "\n".join(f"| {float(share):.0%} | {kl:.3f} |" for share, kl in record["ffn_pruning_kl"].items())
    return f"""# The bundled parent `{recipe["name"]}`

A Llama-shaped model of {record["num_parameters"]:,} parameters ({shape["num_layers"]} layers, hidden size
{shape["hidden_size"]}, FFN width {shape["intermediate_size"]}, {shape["num_heads"]} attention heads and as many KV heads of
{shape["head_dim"]} channels, vocabulary {shape["vocab_size"]}, tied embeddings), stored in bf16. It exists to be compressed:
what it knows can be graded, and its FFNs are needed.

- Data: {recipe["skill_share"]:.0%} skill lines from `puzzle_dag.corpus.skills` (an invented world of seed
  {recipe["world_seed"]}), the rest Python {record["python_version"]}'s standard library, read from the machine that trained
  it and not part of this repository. Files whose path hashes to "heldout" were never trained on.
- Tokens: {recipe["num_tokens"]:,} in rows of {recipe["row_length"]}; seed {recipe["seed"]}; torch {record["torch_version"]};
  time {curve[-1]["seconds"] / 60:.0f} minutes on a 2-core CPU that other jobs shared.
- Command: `{command}` (resumable; the recipe is the whole configuration).
- The standard library is licensed under the PSF License; the checkpoint holds no verbatim copy by intent, but a language model may
  reproduce short pieces of its training text.

Accuracy on 500 fresh four-choice questions a skill (chance 0.25):

| skill | accuracy |
|---|---|
{skills}

KL divergence (nats a token, 16k held-out tokens of the mix) when every FFN keeps only the channels with the largest
contribution, untrained:

| channels kept | KL |
|---|---|
{pruning}

Training loss (mean since the line before):

| step | tokens | loss | minutes |
|---|---|---|---|
{losses}
"""
