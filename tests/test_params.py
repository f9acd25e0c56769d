from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.params import (
    STEPS,
    check_params,
    load_params,
)
from pipeline.recipes import compose, main, parse_override, parse_overrides, recipe_path
from pipeline.tracking.run_title import setup_of
from tests.conftest import DEFAULTS, PROJECT, params


def test_the_committed_parameters_are_complete() -> None:
    assert load_params(PROJECT / "params.yaml").download.dataset == "digits"


def test_the_recipes_for_own_images_set_the_same_parameters() -> None:
    """Otherwise an applied run of one recipe would change what the other one does."""
    frozen, finetuned = (
        read_yaml(PROJECT / "recipes" / f"{name}.yaml") for name in ("my_images", "my_images_finetune")
    )
    assert {name: set(fields) for name, fields in frozen.items()} == {
        name: set(fields) for name, fields in finetuned.items()
    }


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (PROJECT / "recipes").glob("*.yaml")))
def test_every_recipe_is_valid(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    check_params(compose(recipe, {}), origin=recipe)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("download__dataset", "mnist", "download.dataset is 'mnist'; allowed: 'digits', 'cifar10'"),
        ("download__md5", "xyz", "download.md5 is 'xyz'"),
        ("download__urls", [], "download.urls"),
        ("download__urls", ["https://me:secret@host/a"], "download.urls: https://host/a comes with a user or password"),
        ("download__timeout_seconds", 0, "download.timeout_seconds is 0; allowed: greater than 0"),
        ("normalize__channels", 4, "normalize.channels is 4; allowed: 'auto', 1 or 3"),
        ("normalize__validation_fraction", 0, "normalize.validation_fraction is 0; allowed: greater than 0"),
        ("normalize__validation_fraction", 1, "normalize.validation_fraction is 1; allowed: less than 1"),
        (
            "normalize__max_unreadable_fraction",
            "many",
            "normalize.max_unreadable_fraction is 'many'; allowed: a valid num",
        ),
        ("train__epochs", 2.5, "train.epochs is 2.5; allowed: a valid integer"),
        ("train__epochs", True, "train.epochs is True; allowed: a number"),
        ("train__epochs", 0, "train.epochs is 0; allowed: greater than or equal to 1"),
        ("train__optimizer", "sdg", "train.optimizer is 'sdg'; allowed: 'sgd', 'adam', 'adamw', 'rmsprop' or 'muon'"),
        ("train__learning_rate", float("nan"), "train.learning_rate is nan; allowed: a finite number"),
        ("train__flip", "yes", "train.flip is 'yes'; allowed: a valid boolean"),
        ("train__warmup_fraction", 1.0, "train.warmup_fraction is 1.0; allowed: less than 1"),
        ("train__momentum", 0.0, "train.nesterov is true, but train.optimizer is sgd and train.momentum 0.0"),
        ("train__learnig_rate", 0.1, "unknown key 'train.learnig_rate'; allowed:"),
        ("evaluate__top_k", 1, "evaluate.top_k is 1; allowed: greater than or equal to 2"),
        ("promote__false_promotion_budget", 0, "promote.false_promotion_budget is 0; allowed: greater than 0"),
        ("promote__max_looks", 0.5, "promote.max_looks is 0.5; allowed: a valid integer"),
        ("promote__max_megabytes", "big", "promote.max_megabytes is 'big'; allowed: a valid number"),
    ],
)
def test_a_bad_value_is_reported_with_the_allowed_values(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        params(**{name: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_error_about_an_unknown_key_suggests_a_similar_key() -> None:
    with pytest.raises(UserError, match=r"did you mean learning_rate\?"):
        params(train__learnig_rate=0.1)


def test_a_missing_key_is_reported() -> None:
    values = {section: dict(fields) for section, fields in DEFAULTS.items()}
    del values["train"]["epochs"]
    with pytest.raises(UserError, match=r"train\.epochs is missing"):
        check_params(values, origin="params.yaml")
    values["train"]["epoch"] = 3
    with pytest.raises(UserError, match=r"unknown key 'train\.epoch'; .*did you mean epochs\?"):
        check_params(values, origin="params.yaml")


def test_a_number_in_exponent_form_is_a_number() -> None:
    assert params(train__learning_rate="1e-3").train.learning_rate == 0.001


def test_overrides_take_precedence_over_the_recipe_and_comments_are_kept(workspace: object) -> None:
    values = compose("cifar10_tutorial", {"train.epochs": 7})
    assert (values["train"]["epochs"], values["train"]["batch_size"]) == (7, 4)
    assert "# Every value the pipeline uses" in dump_yaml(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.epoch": 3}, "unknown key 'train.epoch'; allowed:"),
        (
            {"trian.epochs": 3},
            f"unknown section 'trian'; allowed: {', '.join(STEPS)} (did you mean train?); correct the name",
        ),
        (
            {"promote.max_looks": 9},
            "--set: found promote.max_looks, which is no parameter of a run but the policy of the checkout; allowed: "
            "download, normalize, train, evaluate; edit params.yaml of the checkout to change it",
        ),
        ({"train.epochs": "three"}, "--set: train.epochs is 'three'; allowed: a valid integer"),
        ({"train.momentum": 0.0}, "params.yaml with --set: train.nesterov is true, but train.optimizer is sgd and"),
    ],
)
def test_a_bad_override_is_reported(workspace: object, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        compose(None, overrides)
    assert message in str(error.value)


def test_the_error_about_an_unknown_recipe_lists_the_recipes(workspace: object) -> None:
    with pytest.raises(UserError, match=r"--recipe: found 'cifar'; allowed: cifar10_fast94, cifar10_lenet, .*digits"):
        recipe_path("cifar")
    with pytest.raises(UserError, match="--recipe: found ''; allowed: cifar10_fast94, cifar10_lenet"):
        compose("", {})


@pytest.mark.parametrize("text", ["train.epochs", "epochs=3", "train.epochs=[1"])
def test_a_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        parse_override(text)


def test_a_parameter_that_is_set_twice_is_refused() -> None:
    assert parse_overrides(["train.epochs=3", "train.seed=1"]) == {"train.epochs": 3, "train.seed": 1}
    with pytest.raises(UserError, match=r"--set: found train\.epochs twice; allowed: each parameter once; leave one"):
        parse_overrides(["train.epochs=3", "train.seed=1", "train.epochs=4"])


@pytest.mark.parametrize(
    ("typos", "end"),
    [
        ({"epoch": "epochs"}, "?); correct the name"),
        ({"epoch": "epochs", "sed": "seed"}, "; correct the name (and 1 more)"),
    ],
)
def test_a_mistyped_key_is_counted_once(typos: dict[str, str], end: str) -> None:
    values = {section: dict(fields) for section, fields in DEFAULTS.items()}
    for typo, name in typos.items():
        values["train"][typo] = values["train"].pop(name)
    with pytest.raises(UserError, match=r"unknown key 'train\.epoch'") as error:
        check_params(values, origin="params.yaml")
    assert str(error.value).endswith(end)


def test_values_of_overrides_are_parsed_as_yaml() -> None:
    assert parse_override("train.weights=null") == ("train.weights", None)
    assert parse_override("train.learning_rate=0.1") == ("train.learning_rate", 0.1)


def test_a_recipe_can_be_written_into_params_yaml(workspace: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["params", "--recipe", "cifar10_lenet", "--set", "train.epochs=5"])
    main()
    assert load_params().train.epochs == 5
    assert load_params().download.dataset == "cifar10"


@pytest.mark.parametrize("text", ["train: [", "- 1\n", "", "\x00", "train:\n", "train: 3\n"])
def test_an_invalid_params_file_is_refused_in_one_line(workspace: object, text: str) -> None:
    Path("params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml: ") as error:
        load_params()
    assert "\n" not in str(error.value)


def test_recorded_parameters_contain_no_password() -> None:
    flat = params(download__urls=["https://host/a.tar.gz?token=secret#secret", "/data/b.tar.gz"]).flat()
    assert flat["download.urls"] == "https://host/a.tar.gz, /data/b.tar.gz"
    assert flat["train.epochs"] == 20


def test_the_policy_of_promotion_is_no_parameter_of_a_run() -> None:
    assert not [name for name in params(promote__max_looks=7).flat() if name.startswith("promote")]
    changed = {**DEFAULTS, "promote": {**DEFAULTS["promote"], "max_looks": 7}}
    assert setup_of(changed, expected=DEFAULTS, recipe="digits").title == "digits"


def test_a_recipe_cannot_change_the_policy_of_promotion(workspace: object) -> None:
    Path("recipes/lenient.yaml").write_text("promote:\n  max_leaked_fraction: 0.9\n")
    with pytest.raises(
        UserError, match=r"recipes/lenient\.yaml: found promote\.max_leaked_fraction, which is no param"
    ):
        compose("lenient", {})
