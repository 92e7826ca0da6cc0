"""Recipes whose stage cannot be learnt: losses, options and references, in native and in LLaMA-Factory files."""

from __future__ import annotations

from bad_inputs import BadInput
from bad_inputs.recipes import flat, native

LOSSES = (
    "sigmoid, robust, hinge, ipo, kto_pair, bco_pair, exo_pair, nca_pair, sppo_hard, aot, aot_unpaired, apo_zero, "
    "apo_down, discopop, sigmoid_norm, orpo, simpo, cpo"
)


CASES: list[BadInput] = [
    native(
        "a loss misspelt",
        "stage:\n  type: dpo\n  loss: sigmod\n",
        f"r.yaml:5: stage.loss: 'sigmod' is none of its values; did you mean sigmoid? Choose from {LOSSES}",
    ),
    native(
        "one of several losses misspelt",
        "stage:\n  type: dpo\n  loss:\n    sigmoid: 1\n    bco_par: 0.2\n",
        f"r.yaml:7: stage.loss.bco_par: unknown key; did you mean bco_pair? Choose from {LOSSES}",
    ),
    native(
        "a loss misspelt as a word",
        "stage: {type: dpo}\n",
        "command line: stage.loss=simp: 'simp' is none of its values; did you mean simpo? "
        f"Choose from {LOSSES}",
        "stage.loss=simp",
    ),
    native(
        "a loss of pairs for single answers",
        "",
        "command line: stage.loss=ipo: 'ipo' is none of its values; choose from cross_entropy, dft, asft, eaft",
        "stage.loss=ipo",
    ),
    native(
        "a loss without weight",
        "stage: {type: dpo, loss: {sigmoid: 0}}\n",
        "r.yaml:3: stage.loss.sigmoid: should be greater than 0, found the number 0",
    ),
    native(
        "no loss at all",
        "stage: {type: dpo, loss: {}}\n",
        "r.yaml:3: stage: stage.loss is empty: name at least one loss",
    ),
    native(
        "a list of losses",
        "stage: {type: dpo, loss: [sigmoid, ipo]}\n",
        f"r.yaml:3: stage.loss: expected a mapping of keys or one of {LOSSES}, found a list",
    ),
    native(
        "certain labels for exo_pair",
        "stage: {type: dpo, loss: exo_pair}\n",
        "r.yaml:3: stage: stage.label_smoothing should be above 0 for exo_pair, whose labels are never certain "
        "(1e-3 is common)",
    ),
    native(
        "a reference where there is none",
        "stage: {type: dpo, loss: orpo, reference: precompute}\n",
        "r.yaml:3: stage: stage.reference: orpo need no reference; leave it out",
    ),
    native(
        "a reference misspelt",
        "stage: {type: kto, reference: strat}\n",
        "r.yaml:3: stage.reference: 'strat' is none of its values; did you mean start? "
        "Choose from start, base, precompute",
    ),
    native(
        "a key of the reference misspelt",
        "stage: {type: kto, reference: {pth: m}}\n",
        "r.yaml:3: stage.reference.pth: unknown key; did you mean stage.reference.path?",
    ),
    native(
        "adapters of no model",
        "stage: {type: kto, reference: {adapters: [x]}}\n",
        "r.yaml:3: stage.reference: adapters belong to a model: give reference.path too",
    ),
    native(
        "a path under a word",
        "stage: {type: kto, reference: precompute}\n",
        "command line: stage.reference.path=m: stage.reference is no mapping of keys; "
        "give stage.reference as a whole",
        "stage.reference.path=m",
    ),
    native(
        "the base below no adapters",
        "stage: {type: dpo, reference: base}\nmethod: {type: full}\n",
        "r.yaml: stage.reference: base is the model below adapters, and method: full has none; leave it out",
    ),
    native(
        "whole distributions in advance",
        "stage: {type: sft, loss: asft, reference: {path: m, precompute: true}}\n",
        "r.yaml:3: stage: stage.reference: asft compares whole distributions, which are too large to keep; "
        "leave out precompute",
    ),
    native(
        "a reference for cross-entropy",
        "stage: {type: sft, reference: base}\n",
        "r.yaml:3: stage: stage.reference belongs to loss: asft, not to cross_entropy",
    ),
    native(
        "metrics of tokens for a reward model",
        "stage: {type: rm}\ntrain: {metrics: [accuracy]}\n",
        "r.yaml: train.metrics does not go with stage: rm, which predicts no tokens; "
        "evaluations report the accuracy and the margin of the scores of themselves",
    ),
    flat(
        "lf: a loss misspelt",
        "stage: dpo\npref_loss: ipoo\n",
        "lf.yaml:5: pref_loss: 'ipoo' is none of its values; did you mean ipo? "
        "Choose from sigmoid, hinge, ipo, kto_pair, orpo, simpo",
    ),
    flat(
        "lf: smoothing of another loss",
        "stage: dpo\npref_loss: ipo\ndpo_label_smoothing: 0.1\n",
        "lf.yaml:6: dpo_label_smoothing: goes with pref_loss: sigmoid only",
    ),
    flat(
        "lf: a reference of bits that there are not",
        "stage: dpo\nref_model: r\nref_model_quantization_bit: 3\n",
        "lf.yaml:6: ref_model_quantization_bit: the number 3: bnb has 4, 8 bits",
    ),
    flat(
        "lf: packed pairs",
        "stage: dpo\nneat_packing: true\n",
        "lf.yaml:5: neat_packing: goes with stage: sft only",
    ),
]
