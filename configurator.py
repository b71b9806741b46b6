"""Settings: the defaults at the top of a script, then config files and --key=value, from left to right.

The later wins: write config files first. A script lists its settings as plain globals between a
line "# settings ---" and a line of dashes, each with a comment:

    # settings ---------------------------------------------------
    batch_size = 8  # clips per step [>= 1]
    noise_schedule: str = None  # a default of None needs its type
    resume: bool | str = False  # either
    # ------------------------------------------------------------
    config = configure(globals())

`configure` puts the final values into those globals and returns them as a dict. --help prints the
list; a bound at the end of a comment, as [>= 1], [> 0] or [0 to 1], is what the value is checked
against.
"""
import ast
import difflib
import importlib
import math
import os
import re
import runpy
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tqdm import tqdm

BLOCK = re.compile(r'# settings -+\n(.*?)\n *# -{20,}', re.DOTALL)
BOUND = r'\[((?:>=? |\S+ to )\S+)\]'
LARGEST = 10 ** 15  # of the integers: floats are exact up to 9 * 10 ** 15
# key: annotation = default  # comment [bound], where annotation, comment and bound may be missing
SETTING = re.compile(rf' *(\w+)(?:: (\w+(?: \| \w+)?))? = (.+?)(?:  # (.*?(?:{BOUND})?))?')


class UserError(ValueError):
    """A mistake of the user's, in one line: what was given, what was expected, how to mend it.

    Scripts print the line and exit with 1; a notebook can catch it.
    """


def check_choice(name, value, known):
    """Raises UserError if a setting is not one of the known names."""
    if value not in known:
        raise UserError(f'{name}={value!r}: expected one of {", ".join(known)}')


def check_choices(name, text, known):
    """'v,x' -> ['v', 'x'] and '' -> []. Raises UserError if one is not known, or there twice."""
    chosen = text.split(',') if text else []
    for value in chosen:
        check_choice(name, value, known)
    if len(set(chosen)) < len(chosen):
        raise UserError(f'{name}={text!r}: expected different ones')
    return chosen


def check_context(num_context, num_frames):
    """Raises UserError if no frame is left to dream."""
    if num_context >= num_frames:
        raise UserError(f'context_frames={num_context}: expected fewer than num_frames={num_frames}')


def extra(module):
    """Import a module of a package that only some uses need. Raises UserError."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.split('.')[0]
        raise UserError(f'this needs {module}: pip install {package}') from e


def print_one_line(kind, error, trace):
    """As sys.excepthook: one line, not a traceback, for a user's mistake, a disk's fault or Ctrl-C."""
    if issubclass(kind, (UserError, OSError, MemoryError)):
        line = str(error) or 'out of memory'
        tqdm.write(line, file=sys.stderr)  # on a line of its own, whatever bars there are
    elif issubclass(kind, KeyboardInterrupt):
        tqdm.write('interrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@dataclass
class Setting:
    """One line of a script's settings."""
    default: Any
    type: str  # int, float, str, bool or tuple, or two of them like bool | str
    bound: str  # '>= 1', '> 0', '0 to 1' or None


def settings_block(namespace):
    """Pairs (line, match) of the lines between the two rules; a heading matches no SETTING."""
    with open(namespace['__file__']) as f:
        lines = BLOCK.search(f.read())[1].splitlines()
    return [(line, SETTING.fullmatch(line)) for line in lines]


def read_settings(namespace):
    """{key: Setting} of the script or module with these globals."""
    settings = {}
    for _, match in settings_block(namespace):
        if match:
            key, annotation, _, _, bound = match.groups()
            kind = annotation or type(namespace[key]).__name__
            settings[key] = Setting(namespace[key], kind, bound)
    return settings


def print_help(namespace):
    for line, match in settings_block(namespace):
        if match:
            key, _, text, comment, _ = match.groups()
            option = f'--{key}={text}'
            print(f'    {option:<36} {comment or ""}')
        else:
            print(f'\n  {line.strip()}')


def parse(text, setting):
    """The value that --key=text means; text itself where it is no Python literal."""
    if text.startswith('~'):
        text = os.path.expanduser(text)  # which shells leave to us after --key=
    if setting.type == 'str':
        return None if setting.default is None and text.lower() == 'none' else text
    if text.lower() in ('true', 'false', 'none'):
        text = text.capitalize()
    elif setting.type == 'bool | str':
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def within(value, bound):
    """Whether a value keeps a bound like '>= 1', '> 0' or '0 to 1'."""
    if ' to ' in bound:
        low, high = bound.split(' to ')
        return float(low) <= value <= float(high)
    sign, limit = bound.split()
    if sign == '>':
        return value > float(limit)
    return value >= float(limit)


def checked(key, value, settings, source):
    """The value as it will be used. Raises UserError."""
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)[0]
        raise UserError(f'{source}: unknown key {key!r}; did you mean {nearest!r}? '
                        '(--help lists them all)')
    setting = settings[key]
    if value is None and setting.default is None:
        return None
    if type(value) is float and not math.isfinite(value):
        raise UserError(f'{source}: {key}={value!r}: expected a finite number')
    if type(value) is int and abs(value) > LARGEST:
        raise UserError(f'{source}: {key}={value!r}: expected at most {LARGEST:g}')
    if setting.type == 'float' and type(value) is int:
        value = float(value)
    if type(value).__name__ not in setting.type.split(' | '):
        raise UserError(f'{source}: {key}={value!r} is of the wrong type; '
                        f'expected {setting.type}, like {setting.default!r}')
    if setting.bound and not within(value, setting.bound):
        raise UserError(f'{source}: {key}={value!r}: expected {setting.bound}')
    return value


def run_config_file(path):
    """{key: value} that a config file assigns; it may start from another one by importing it."""
    if not os.path.exists(path):
        raise UserError(f'{path}: no such config file')
    try:
        values = runpy.run_path(path)
    except Exception as e:
        raise UserError(f'{path}: {type(e).__name__}: {e}') from e
    return {key: value for key, value in values.items()
            if not key.startswith('_') and not isinstance(value, ModuleType)}


def configure(namespace, shared=None, argv=None, strict=True):
    """Apply the command line to the settings of a script with these globals(): {key: value}.

    shared: a module with settings of its own, which the script has too: they are in the returned
    dict only. argv: instead of sys.argv[1:]. strict=False passes over what config files say to
    other scripts.
    """
    sys.excepthook = print_one_line
    argv = sys.argv[1:] if argv is None else argv
    settings = own = read_settings(namespace)
    if shared:
        settings = own | read_settings(vars(shared))
    if '--help' in argv:
        print(namespace['__doc__'].strip(), '\n\nSettings:')
        print_help(namespace)
        if shared:
            print_help(vars(shared))
        sys.exit()

    values = {key: setting.default for key, setting in settings.items()}
    for arg in argv:
        option = re.fullmatch(r'--(\w+)=(.*)', arg, re.DOTALL)
        if option:
            key, text = option.groups()
            value = parse(text, settings[key]) if key in settings else text
            values[key] = checked(key, value, settings, 'command line')
        elif arg.endswith('.py'):
            for key, value in run_config_file(arg).items():
                if strict or key in settings:
                    values[key] = checked(key, value, settings, arg)
        else:
            raise UserError(f'{arg!r}: expected a config file (*.py) or --key=value; '
                            '--help lists the keys')
    namespace.update({key: values[key] for key in own})
    return values
