"""``visionmamba info``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._common import JsonOption, check_model_name, console, print_json


def _facts(name: str) -> dict[str, Any]:
    import timm

    from visionmamba.zoo import published_top1, summarize, weights_source

    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    return {
        **summarize(name).as_dict(),
        "weights": weights_source(cfg),
        "top1": published_top1(cfg),
        "classes": cfg["num_classes"],
        "input_size": list(cfg["input_size"]),
        "fixed_input_size": cfg.get("fixed_input_size", False),
        "crop_pct": cfg["crop_pct"],
        "interpolation": cfg["interpolation"],
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "license": cfg.get("license"),
        "paper": cfg.get("paper_name"),
        "paper_ids": cfg.get("paper_ids"),
        "code": cfg.get("origin_url"),
        "description": cfg.get("description"),
        "notes": cfg.get("notes"),
        "features": [
            {"channels": level["num_chs"], "stride": level["reduction"], "module": level["module"]}
            for level in getattr(model, "feature_info", [])
        ],
    }


def info(
    name: Annotated[str, typer.Argument(help="A model's name, as 'visionmamba list' shows it.")],
    as_json: JsonOption = False,
) -> None:
    """Show what is known about a model: size, input, published result, weights, licence, paper, features."""
    from rich.table import Table

    from visionmamba.zoo import model_names

    check_model_name(name, model_names())
    facts = _facts(name)
    if as_json:
        print_json(facts)
        return
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    features = facts.pop("features")
    for key, value in facts.items():
        if value is not None:
            shown = f"{value:,}" if key == "params" else value
            table.add_row(key, ", ".join(map(str, shown)) if isinstance(shown, list | tuple) else str(shown))
    levels = {f"{level['channels']} channels at 1/{level['stride']}": level["module"] for level in features}
    table.add_row("features", "\n".join(f"{text} ({module})" for text, module in levels.items()))
    console().print(table)
