"""The Python snippets of the documentation run as they stand there."""
import os
import re

import pytest
from conftest import ROOT


def snippets(name):
    with open(os.path.join(ROOT, name)) as f:
        found = re.findall(r'```python\n(.*?)```', f.read(), re.DOTALL)
    return [pytest.param(code, id=f'{name}-{i}') for i, code in enumerate(found)]


@pytest.mark.parametrize('code', [*snippets('README.md'), *snippets('docs/datasets.md')])
def test_a_snippet_runs(code, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs('out')
    os.symlink(trained, 'out/wall')
    if 'my_episodes' in code:
        import numpy as np
        rng = np.random.default_rng(0)
        episode = rng.integers(256, size=(20, 3, 8, 8), dtype=np.uint8), rng.normal(size=(20, 2))
        exec(code, {'my_episodes': [episode] * 12})
    else:
        exec(code, {})
