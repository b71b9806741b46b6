"""Settings: the defaults at the top of a script, then config files, then --key=value; later wins.

    python train.py config/wall.py --pred_name=v --batch_size=32

A script lists its settings as plain globals with a comment beside each, between a line "# settings ---" and the call
`configure(globals())`, which puts the final values into those globals and returns them as a dict. A default of None
needs an annotation (`x: str = None`) and means "not set". Any mistake ends the program with one line that names the
key, where it came from and the cure.
"""
import ast
import difflib
import glob
import os
import re
import runpy
import sys
from types import ModuleType

SETTING = re.compile(r'\s*(\w+)(?:: (\w+))? = (.+?)(?:  # (.*))?$')


def configure(namespace, argv=None, strict=True):
    """Apply sys.argv (or argv) to the settings of the script whose globals() this is; returns {key: value}.

    strict=False passes over what a config file says to other scripts.
    """
    argv = sys.argv[1:] if argv is None else argv
    with open(namespace['__file__']) as f:
        lines = re.search(r'# settings -.*?configure\(globals', f.read(), re.DOTALL)[0].splitlines()
    found = {i: m for i, line in enumerate(lines) if (m := SETTING.fullmatch(line)) and m[1] in namespace}
    keys = {m[1]: m[2] or type(namespace[m[1]]).__name__ for m in found.values()}  # {key: name of its type}
    if '--help' in argv or '-h' in argv:
        print(namespace['__doc__'].strip() + '\n\nSettings (--key=value):')
        for i, m in found.items():
            if lines[i - 1].startswith('# ') and '---' not in lines[i - 1]:
                print(f'\n  {lines[i - 1]}')
            print(f'    --{m[1] + "=" + m[3]:<34} {m[4] or ""}')
        sys.exit()

    def put(key, value, source, parse=False):
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
            sys.exit(f'{source}: unknown key {key!r}; did you mean {near!r}? (--help lists them all)')
        kind, given = keys[key], value
        if parse and value.lower() == 'none' and namespace[key] is None:
            value = None
        elif parse and kind != 'str':
            try:
                value = ast.literal_eval(value.capitalize() if value.lower() in ('true', 'false') else value)
            except (ValueError, SyntaxError):
                pass
        if kind == 'float' and type(value) is int:
            value = float(value)
        if type(value).__name__ != kind and not (value is None and namespace[key] is None):
            sys.exit(f'{source}: {key}={given!r} is of the wrong type; expected {kind}, like {namespace[key]!r}')
        values[key] = value

    values = {key: namespace[key] for key in keys}
    for arg in argv:
        if m := re.fullmatch(r'--(\w+)=(.*)', arg, re.DOTALL):
            put(m[1], m[2], 'command line', parse=True)
        elif arg.endswith('.py'):
            if not os.path.exists(arg):
                sys.exit(f'{arg}: no such config file; there are {", ".join(sorted(glob.glob("config/*.py")))}')
            try:
                settings = runpy.run_path(arg)
            except Exception as e:
                sys.exit(f'{arg}: {type(e).__name__}: {e}')
            for key, value in settings.items():
                if not key.startswith('_') and not isinstance(value, ModuleType) and (strict or key in keys):
                    put(key, value, arg)
        else:
            sys.exit(f'{arg!r}: expected a config file (*.py) or --key=value; --help lists the keys')
    namespace.update(values)
    return values
