"""The page from HiPPO to S6: its code blocks run as they are printed, and show what the text beside them says."""

import re
from pathlib import Path

import pytest
import torch

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_PAGE = _DOCS / "from_hippo_to_s6.md"


def test_the_blocks_show_what_the_page_says(capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    names, printed, held = {}, [], []
    for block in blocks:
        exec(compile(block, str(_PAGE), "exec"), names)
        printed.append(capsys.readouterr().out.splitlines())
        held.append(dict(names))
    memory, steps, convolution, _, selection, duality = printed
    assert float(memory[0].split()[-1]) < 1e-3 and held[0]["coefficients"].shape == (1000, 25)
    assert [float(line.split()[-1]) for line in steps] == pytest.approx([0.961, 0.964, 1.132, 0.833], abs=1e-3)
    assert float(convolution[0].split()[-1]) < 1e-4
    torch.testing.assert_close(held[3]["A"], -torch.arange(1.0, 5).expand(16, 4))
    after = -5 + 10 * torch.exp(torch.tensor(-5.0))
    torch.testing.assert_close(held[4]["y"].flatten(), torch.tensor([0.0, 10, 10, 10, after, after, after]))
    assert selection[0].startswith("tensor([ 0.0000, 10.0000")
    assert float(duality[0].split()[-1]) < 1e-5


def test_the_figures_are_there():
    text = _PAGE.read_text(encoding="utf-8")
    for figure in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (_DOCS / figure).is_file(), figure
