"""cim_models.pretraining.config: every value is checked, every error names its place."""

import math
from dataclasses import fields, is_dataclass

import pytest
import yaml

from cim_models.errors import ConfigError
from cim_models.pretraining.config import LIMITS, RISING, PretrainConfig, from_dict, load_recipe, to_dict


def test_round_trip_through_yaml():
    config = PretrainConfig(out="somewhere", seed=3, precision="bf16")
    config.optimiser.clip = None
    config.optimiser.lr = 1e-5
    config.views.exemplars.angle = (0.0, 0.0)
    config.data.path = "photos – 猫"
    values = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert from_dict(PretrainConfig, values, "there") == config
    assert isinstance(from_dict(PretrainConfig, values, "there").views.exemplars.angle, tuple)


def test_nothing_is_nothing_but_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# all as it is\n")
    assert load_recipe(tmp_path / "empty.yaml") == PretrainConfig()


def test_the_defaults_of_two_configurations_are_their_own():
    PretrainConfig().views.exemplars.count = 99
    assert PretrainConfig().views.exemplars.count == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {}", "r.yaml: no field 'optimizer'; there are out, model"),
        ("optimiser: {learning_rate: 1}", "r.yaml: optimiser: no field 'learning_rate'; there are batch_size"),
        ("views: {exemplars: {counts: 1}}", "r.yaml: views: exemplars: no field 'counts'"),
        ("optimiser: 3", "r.yaml: optimiser: expected fields of OptimiserConfig, found 3"),
        ("- model", "r.yaml: expected fields of PretrainConfig"),
        ("seed: '1'", "r.yaml: seed: '1' is not int"),
        ("seed: 1.0", "r.yaml: seed: 1.0 is not int"),
        ("seed: true", "r.yaml: seed: True is not int"),
        ("resume: 1", "r.yaml: resume: 1 is not bool or auto"),
        ("model: 5", "r.yaml: model: 5 is not str"),
        ("precision: fp16", "r.yaml: precision: 'fp16' is not one of auto, fp32, bf16"),
        ("pretext: {reduction: [mean]}", r"r.yaml: pretext: reduction: \['mean'\] is not one of mean, sum"),
        ("optimiser: {lr: fast}", "r.yaml: optimiser: lr: 'fast' is not float"),
        ("optimiser: {lr: true}", "r.yaml: optimiser: lr: True is not float"),
        ("optimiser: {clip: often}", "r.yaml: optimiser: clip: 'often' is not float"),
        ("optimiser: {betas: 0.9}", r"r.yaml: optimiser: betas: 0.9 is not tuple\[float, float\]"),
        ("optimiser: {betas: [0.9]}", r"r.yaml: optimiser: betas: \[0.9\] is not tuple"),
        ("data: {crop_area: [0.5, 0.7, 1]}", "r.yaml: data: crop_area: .* is not tuple"),
        ("data: {crop_area: [0.5, big]}", "r.yaml: data: crop_area: 'big' is not float"),
        ("data: {size: 64", "r.yaml: not a readable YAML file"),
        ("\x00", "r.yaml: not a readable YAML file"),
    ],
)
def test_wrong_recipes_are_named(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_files_that_are_no_recipes(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="r.yaml: not a readable YAML file"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="no recipe 'imagenet': there are .*imagenet-1k.*; or give a YAML file"):
        load_recipe("imagenet")
    with pytest.raises(ConfigError, match="no recipe '.*absent.yaml'"):
        load_recipe(tmp_path / "absent.yaml")


def test_numbers_may_be_written_in_any_way(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "optimiser: {lr: 1e-3, epochs: 3, clip: null, betas: [0, 5e-1]}\nviews: {exemplars: {angle: [0, 90]}}"
    )
    config = load_recipe(tmp_path / "r.yaml")
    assert (config.optimiser.lr, config.optimiser.epochs, config.optimiser.clip) == (1e-3, 3.0, None)
    assert config.optimiser.betas == (0.0, 0.5) and config.views.exemplars.angle == (0.0, 90.0)


WRONG = {
    "data__size": 0,
    "data__workers": -1,
    "data__flip": 1.5,
    "data__crop_area": (0.0, 1.0),
    "data__crop_ratio": (2.0, 1.0),
    "views__exemplars__count": 0,
    "views__exemplars__area": (0.1, 1.1),
    "views__exemplars__ratio": (3.0, 0.3),
    "views__exemplars__angle": (45.0, -45.0),
    "views__colour__sigma": (0.0, 1.0),
    "views__colour__hue": 0.7,
    "views__colour__grey": -0.1,
    "backbone__drop_path": 1.0,
    "pretext__global_temperature": 0.0,
    "optimiser__batch_size": 1,
    "optimiser__accumulation": 0,
    "optimiser__epochs": math.inf,
    "optimiser__lr": math.nan,
    "optimiser__betas": (0.9, 1.0),
    "optimiser__clip": 0.0,
    "optimiser__momentum": 1.1,
    "optimiser__weight_decay": -0.05,
    "seed": -1,
    "log_every": 0,
    "save_every": 0,
    "save_minutes": 0.0,
    "keep": 0,
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_cannot_be_meant(configure, name):
    with pytest.raises(ConfigError, match=rf"^{name.replace('__', '.')} is .*; it must "):
        configure("photos", "run", **{name: WRONG[name]}).check()


@pytest.mark.parametrize(
    ("name", "value"), [("optimiser__lr", "1"), ("model", None), ("data__crop_area", (1.0,)), ("precision", "half")]
)
def test_wrong_types_from_python(configure, name, value):
    if name == "optimiser__lr":
        value = [value]
    with pytest.raises(ConfigError, match=f"configuration: {name.replace('__', ': ')}: "):
        configure("photos", "run", **{name: value}).check()


def test_what_must_be_given(configure):
    configure("photos", "run", optimiser__clip=None, seed=2**32 - 1, views__exemplars__area=[0.5, 0.5]).check()
    with pytest.raises(ConfigError, match="data.path is empty; give a folder"):
        configure("", "run").check()
    with pytest.raises(ConfigError, match="out is empty; give a run directory"):
        configure("photos", "").check()


def test_every_number_has_its_limits():
    def numbers(config, prefix=""):
        for field in fields(config):
            value, name = getattr(config, field.name), prefix + field.name
            if is_dataclass(value):
                yield from numbers(value, f"{name}.")
            elif isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
                yield name

    limited = {name for _, _, names in LIMITS for name in names.split()}
    assert limited == set(numbers(PretrainConfig()))
    assert set(RISING.split()) <= limited
