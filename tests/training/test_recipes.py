"""Recipes: every published one builds its model and optimiser; every mistake is one sentence that names it."""

from pathlib import Path

import pytest
import timm
import torch

import visionmamba
from visionmamba.training import ConfigError, TrainConfig, load_config
from visionmamba.training.engine import create_model, create_optimizer

RECIPES = sorted((Path(visionmamba.__file__).parents[1] / "configs" / "classification").glob("*.yaml"))


def test_there_is_a_recipe_for_every_family():
    named = {timm.model_entrypoint(load_config(path).model).__module__.rpartition(".")[2] for path in RECIPES}
    assert named >= {"vim", "vmamba", "plainmamba", "local_vim", "local_vmamba", "efficient_vmamba", "mamba_nd"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(path):
    config = load_config(path)
    with torch.device("meta"):
        model = create_model(config)
    groups = create_optimizer(config, model).param_groups
    covered = {id(parameter) for group in groups for parameter in group["params"]}
    assert covered == {id(parameter) for parameter in model.parameters()}
    assert {group["weight_decay"] for group in groups} == {0.0, config.weight_decay}


def test_what_the_authors_of_vim_decay():
    config = load_config(next(path for path in RECIPES if path.stem == "vim_tiny"))
    with torch.device("meta"):
        model = create_model(config)
    without = next(group for group in create_optimizer(config, model).param_groups if group["weight_decay"] == 0)
    ids = {id(parameter) for parameter in without["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in ids}
    assert any(name.endswith("pos_embed") for name in names)
    assert any(name.endswith("ssm.D") for name in names)
    assert not any("A_log" in name or "conv_weight" in name for name in names)


def test_learning_rates_scale_with_the_batch():
    config = TrainConfig(model="test_vim", lr=1e-3, lr_batch=1024, batch_size=256)
    optimizer = create_optimizer(config, create_model(config))
    assert all(group["lr"] == pytest.approx(2.5e-4) for group in optimizer.param_groups)


def test_layer_decay_slows_the_early_layers():
    config = TrainConfig(model="test_vim", layer_decay=0.5)
    scales = {group["lr_scale"] for group in create_optimizer(config, create_model(config)).param_groups}
    assert max(scales) == 1.0
    assert min(scales) <= 0.25


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_classifier_learns_faster_than_the_backbone(layer_decay):
    config = TrainConfig(model="test_vim", backbone_lr=0.1, layer_decay=layer_decay)
    model = create_model(config)
    scale = {
        id(p): group["lr_scale"] for group in create_optimizer(config, model).param_groups for p in group["params"]
    }
    assert {scale[id(parameter)] for parameter in model.get_classifier().parameters()} == {1.0}
    assert max(scale[id(parameter)] for name, parameter in model.named_parameters() if "head" not in name) <= 0.1


def test_overrides_come_last_and_keep_their_types(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 1e-3\nscale: [0.5, 1]\nepochs: 3\n")
    config = load_config(path, ["epochs=7", "out=12", "model_args={d_state: 4}", "clip_grad=null", "mixup=1"])
    assert (config.lr, config.scale, config.epochs, config.out) == (1e-3, (0.5, 1.0), 7, "12")
    assert config.model_args == {"d_state": 4}
    assert config.clip_grad is None
    assert isinstance(config.mixup, float)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("weight_decoy: 1", [], r"recipe.yaml: unknown key 'weight_decoy'; did you mean weight_decay"),
        ("", ["mix_up=1"], r"mix_up=: unknown key 'mix_up'; did you mean mixup"),
        ("", ["zzz=1"], r"unknown key 'zzz'; known keys are model, data"),
        ("epochs: many", [], r"recipe.yaml: epochs expects int, got 'many'"),
        ("epochs: true", [], r"epochs expects int, got True"),
        ("epochs: 0", [], r"epochs: expected at least 1, got 0"),
        ("batch_size: 8", ["workers=-1"], r"workers: expected at least 0, got -1"),
        ("", ["lr=.nan"], r"lr: expected at least 0, got nan"),
        ("betas: [a, 1]", [], r"betas expects a list of float or nothing, got \['a', 1\]"),
        ("scale: [1]", [], r"scale: expected the two ends of a range, got \[1.0\]"),
        ("sched: cosin", [], r"sched: expected one of cosine, tanh, .*, got 'cosin'"),
        ("precision: fp8", [], r"precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ("- a\n- b", [], r"expected keys and values, got list"),
        ("a: [", [], r"not valid YAML"),
        ("", ["epochs"], r"expected key=value, got 'epochs'"),
        ("pretrained: true\ncheckpoint: x", [], r"pretrained and checkpoint exclude each other"),
        ("cuda_graph: true\ncompile: true", [], r"cuda_graph and compile exclude each other: a graph replays"),
        ("cuda_graph: true", ["grad_checkpointing=true"], r"cuda_graph and grad_checkpointing exclude each other"),
        ("", ["cuda_graph=1"], r"cuda_graph expects bool, got 1"),
        ("mixup: 0.8\nbatch_size: 33", [], r"batch_size: mixup and cutmix pair images, and a pass has 33"),
    ],
)
def test_mistakes_are_named(text, overrides, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)


def test_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")
