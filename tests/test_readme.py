"""The Python snippets of the documentation run as they stand there."""
import ast
import glob
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def snippets(name):
    with open(os.path.join(ROOT, name)) as f:
        found = re.findall(r'```python\n(.*?)```', f.read(), re.DOTALL)
    return [pytest.param(code, id=f'{name}-{i}') for i, code in enumerate(found)]


@pytest.mark.parametrize('code', [*snippets('README.md'), *snippets('docs/datasets.md'), *snippets('docs/dreaming.md')])
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


def test_the_files_are_used_from_another_folder(trained, tmp_path):
    os.makedirs(tmp_path / 'out')
    os.symlink(trained, tmp_path / 'out' / 'wall')
    code, = [s.values[0] for s in snippets('docs/dreaming.md') if '/path/to/nanowm' in s.values[0]]
    program = code.replace('/path/to/nanowm', ROOT) + 'print(type(model).__name__)'
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == 'NanoWM\n', done.stderr
    sample = [os.path.join(ROOT, 'sample.py'), '--num_clips=1', '--num_frames=3']
    done = subprocess.run([sys.executable, *sample], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and os.path.exists(f'{trained}/rollout.gif'), done.stderr


def exits(path):
    """The functions of a file that end the program, each with its name."""
    with open(path) as f:
        tree = ast.parse(f.read())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            if any(isinstance(node, ast.Attribute) and node.attr in ('exit', '_exit') for node in ast.walk(function)):
                yield f'{os.path.basename(path)}: {function.name}'


def test_functions_raise_and_only_scripts_exit():
    found = {name for path in glob.glob(os.path.join(ROOT, '*.py')) for name in exits(path)}
    assert found == {'configurator.py: configure',  # --help
                     'readers.py: start_worker', 'readers.py: end_with_parent'}  # a process of its own
