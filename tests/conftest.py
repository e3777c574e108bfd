"""Fixtures that every test file may use: tiny random parents, saved as normal Hugging Face checkpoints."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_project import Project, copy_project, make_project
from ticking_engine import TickingEngine
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from puzzle_dag.architecture import Block
from puzzle_dag.config import ParentSource
from puzzle_dag.corpus.skills import build_skills
from puzzle_dag.corpus.tokenizer import train_tokenizer
from puzzle_dag.corpus.world import build_world
from puzzle_dag.model.checkpoint import child_config
from puzzle_dag.model.configuration_puzzle_dag import PuzzleDagConfig
from puzzle_dag.model.modeling_puzzle_dag import PuzzleDagForCausalLM
from puzzle_dag.model.parent import read_parent_shape

torch.set_num_threads(1)

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3")
_CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
}


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every weight, norms and biases included, so that no trait of a family hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * draw if name.endswith("norm.weight") else 0.08 * draw)


@pytest.fixture(scope="session")
def micro_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 600 tokens, trained on a few lines of every skill."""
    rng = random.Random(0)
    skills = build_skills(build_world(7))
    return train_tokenizer([skill.line(rng) for skill in skills for _ in range(200)], vocab_size=600)


@pytest.fixture(scope="session")
def save_parent(micro_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save_parent(family, dtype=..., **overrides)` saves a 2-layer random checkpoint of a family and returns its folder."""

    def save(family: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **overrides: Any) -> Path:
        config_class, model_class, traits = _CLASSES[family]
        shape: dict[str, Any] = {
            "vocab_size": len(micro_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "bos_token_id": micro_tokenizer.bos_token_id,
            "eos_token_id": micro_tokenizer.eos_token_id,
            "pad_token_id": micro_tokenizer.pad_token_id,
        }
        if family == "qwen2":  # it derives the head dimension from the hidden size
            shape.update(head_dim=None, hidden_size=128)
        config = config_class(**{**{k: v for k, v in shape.items() if v is not None}, **traits, **overrides})
        model = model_class(config)
        randomise(model, seed=FAMILY_NAMES.index(family))
        folder = tmp_path_factory.mktemp(family) / "parent"
        model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        micro_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def micro_parent_folder(save_parent: Callable[..., Path]) -> Path:
    """A 2-layer random Llama (hidden 64, 4 heads, 4 KV heads, head_dim 32, FFN 128) in float32 with a tokenizer."""
    return save_parent("llama")


@pytest.fixture(scope="session")
def refreshed_project(micro_parent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The micro profile with a width more in layer 0, refreshed with an engine whose times are arithmetic; copy it, don't change it."""
    made = make_project(tmp_path_factory.mktemp("refreshed"), micro_parent_folder)
    made.edit(made.profile_file, search_space__overrides={0: {"add_ffn": ["w32"]}})
    with pytest.MonkeyPatch.context() as patch:
        TickingEngine().install(patch)
        record = made.refresh()
    assert record.ok, [o for o in record.outcomes if o.state != "ran"]
    return made


@pytest.fixture(scope="module")
def engine() -> Iterator[TickingEngine]:
    """An engine whose times are arithmetic, in vLLM's place while the tests of a file run."""
    with pytest.MonkeyPatch.context() as patch:
        found = TickingEngine()
        found.install(patch)
        yield found


@pytest.fixture(scope="module")
def project(
    refreshed_project: Project, tmp_path_factory: pytest.TempPathFactory, engine: TickingEngine, request: pytest.FixtureRequest
) -> Project:
    """A copy of `refreshed_project` that the tests of a file share, unless the file makes one of its own."""
    return copy_project(refreshed_project, tmp_path_factory.mktemp(request.module.__name__))


@pytest.fixture
def no_jobs_yet(project: Project, engine: TickingEngine) -> None:
    """The shared project, which every test leaves up to date, and an engine that forgot what the tests before asked of it."""
    engine.jobs.clear()


@pytest.fixture(scope="session")
def family_parent_folder(save_parent: Callable[..., Path], micro_parent_folder: Path) -> dict[str, Path]:
    """A float32 parent of every supported family, by its name."""
    return {"llama": micro_parent_folder, **{family: save_parent(family) for family in FAMILY_NAMES[1:]}}


@pytest.fixture(scope="session")
def make_child(micro_tokenizer: PreTrainedTokenizerFast, family_parent_folder: dict[str, Path]) -> Callable[..., PuzzleDagForCausalLM]:
    """`make_child(family, *block_names)` returns a float32 child with random weights, one layer a block name."""

    def make(family: str, *names: str, seed: int = 11) -> PuzzleDagForCausalLM:
        fields = read_parent_shape(ParentSource(path=str(family_parent_folder[family])), Path()).to_dict()
        kinds = fields.pop("layer_types")
        fields.update(num_hidden_layers=len(names), layer_types=[kinds[i % len(kinds)] for i in range(len(names))])
        shape = PuzzleDagConfig(**fields)
        model = PuzzleDagForCausalLM(child_config(shape, tuple(Block.parse(name) for name in names))).eval()
        randomise(model, seed)
        return model

    return make
