"""Why tasks help each other: the mechanisms of Caruana (1997), each against its control, over many seeds.

Run:      lightning-mtl run caruana
          (all six, one after the other; for one of them its name: overfit, amplify, attributes, eavesdrop, bias1,
          bias2, as in lightning-mtl run caruana amplify)
Override: --seeds 60                                             more networks
          --seed 1                                               other data and other networks
          --out docs/images/caruana_amplify.png                  the figure there too (for `all`: a folder)
Expect:   each about half a minute on a free core. Tables with mean and spread over seeds, tests between arms, a
          figure, and in a few words what was not shown.
Source:   R. Caruana, Multitask learning, Machine Learning 28, 1997. The tasks here are made anew, and small.

Each mechanism is one file in `_caruana/`, called as it is here. All seeds of an arm are one network with a further
dimension (`_lab.seeds`), so thirty cost little more than one.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli

from _caruana.amplify import amplify
from _caruana.attributes import attributes
from _caruana.bias1 import bias1
from _caruana.bias2 import bias2
from _caruana.eavesdrop import eavesdrop
from _caruana.overfit import overfit
from _caruana.study import Study

STUDIES: dict[str, Callable[..., Study]] = {
    "overfit": overfit,
    "amplify": amplify,
    "attributes": attributes,
    "eavesdrop": eavesdrop,
    "bias1": bias1,
    "bias2": bias2,
}


def everything(seeds: int | None = None, seed: int = 0, out: Path | None = None) -> list[Study]:
    """All six, one after the other.

    Args:
        seeds: how many networks per arm; by default each study's own number.
        seed: of the data and the networks.
        out: a folder for the figures.
    """
    options = {} if seeds is None else {"seeds": seeds}
    return [
        study(**options, seed=seed, out=None if out is None else out / f"caruana_{name}.png")
        for name, study in STUDIES.items()
    ]


def main(args: Sequence[str] | None = None) -> Study | list[Study]:
    """The command line of this recipe; without a name it is ``all``. Returns what was found."""
    torch.set_num_threads(1)
    given = sys.argv[1:] if args is None else list(args)
    return auto_cli(STUDIES | {"all": everything}, args=given or ["all"])


if __name__ == "__main__":
    main()
