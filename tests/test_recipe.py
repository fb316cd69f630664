"""Recipes: what decides them, and what does not."""

import argparse

import pytest

from lib import network, recipe
from lib.errors import UserError
from lib.recipe import Defaults
from mae import MAE

DEFAULTS = Defaults(epochs=2, fewest_steps=1000, batch_size=64, lr=0.1, most_validations=4,
                    few={"augment": ("flips",), "patch_dropout": 0.5})  # fmt: skip


def recipe_of(images, **given):
    nothing = dict.fromkeys(("epochs", "batch_size", "lr", "weight_decay", "augment", "validations", "patch_dropout"))
    return DEFAULTS.recipe(argparse.Namespace(**{**nothing, "seed": 0, "precision": "auto", **given}), images)


def test_few_images_are_passed_over_more_often():
    assert [recipe_of(images).epochs for images in (72_000, 640, 10)] == [2, 100, 1000]
    assert recipe_of(640, epochs=3).epochs == 3


def test_the_number_of_images_alone_says_whether_they_are_few():
    assert not DEFAULTS.are_few(32_000)
    assert DEFAULTS.are_few(31_999 - 63)
    for given in ({}, {"batch_size": 1024}, {"epochs": 1}, {"batch_size": 1, "epochs": 50}):
        assert recipe_of(72_000, **given).augment == ("halfturn",)
        assert recipe_of(640, **given).augment == ("flips",)


def test_epochs_are_validated_once_each_until_they_are_many():
    assert [recipe_of(64_000, epochs=n).validations for n in (1, 3, 100)] == [1, 3, 4]


def test_augmentations_mean_the_same_in_any_order():
    """Another order was another setting: not resumed, and trained again."""
    assert recipe.augmentation_kinds("noise,halfturn,noise") == ("halfturn", "noise")
    assert recipe.augmentation_kinds("none") == ()
    for wrong in ("", ",", "noise,", "nois"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not one of halfturn, flips, noise, shift, rotate"):
            recipe.augmentation_kinds(wrong)


def test_images_that_are_too_large_are_named_and_not_an_option():
    with pytest.raises(UserError, match="pixels of a side of the images must be at most 4096, got 4160"):
        network.build(MAE, {"img_size": 4160, "patch_size": 65})
