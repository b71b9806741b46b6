"""Where training's numbers go: log.jsonl, TensorBoard if it is installed, W&B if asked for."""
import contextlib
import json
import os
import secrets

import numpy as np

from configurator import UserError, extra
from machine import RANK, write_whole
from pictures import plot, write_picture

POINTS = 100  # of a curve


def lines_until(path, step):
    """The lines of a log up to that step: what came after the checkpoint will be logged again."""
    if not os.path.exists(path):
        return ''
    kept = ''
    with open(path, errors='replace') as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # as after a kill
                if line.endswith('\n') and json.loads(line)['step'] <= step:
                    kept += line
    return kept


def wandb_id(out_dir, step):
    """The id of a run that goes on in its folder; one that begins gets a new one, whatever its name."""
    path = os.path.join(out_dir, 'wandb_id')
    if step == 0 or not os.path.exists(path):
        write_whole(path, secrets.token_hex(4))
    with open(path) as f:
        return f.read()


class Logger:
    """Logs on the first of several processes; on the others it does nothing."""

    def __init__(self, out_dir, config, step, wandb_project=''):
        """wandb_project: '' is without Weights & Biases."""
        self.folder, self.path = out_dir, os.path.join(out_dir, 'log.jsonl')
        self.board = self.wandb = None
        if RANK > 0:
            return
        write_whole(self.path, lines_until(self.path, step))
        write_whole(os.path.join(out_dir, 'config.json'), json.dumps(config, indent=1))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(os.path.join(out_dir, 'tb'), purge_step=step + 1)
        if wandb_project:
            name = os.path.basename(os.path.normpath(out_dir))
            self.wandb = extra('wandb').init(project=wandb_project, name=name, config=config,
                                             id=wandb_id(out_dir, step), resume='allow')

    def log(self, step, **values):
        if RANK > 0:
            return
        try:
            with open(self.path, 'a') as f:
                f.write(json.dumps({'step': step, **values}) + '\n')
        except OSError as e:
            raise UserError(f'cannot write {self.path}: {e.strerror}; go on with --resume=True') from e
        if self.board:
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def plot_losses(self):
        """Draw the training loss, in at most POINTS means, and the validation loss: loss.png."""
        if RANK > 0:
            return
        with open(self.path) as f:
            logged = [json.loads(line) for line in f]
        training = {line['step']: line['loss'] for line in logged if 'loss' in line}
        held_out = {line['step']: line['val_loss'] for line in logged if 'val_loss' in line}
        steps = np.array_split(list(training), min(POINTS, len(training)))
        training = {part[-1]: np.mean([training[step] for step in part]) for part in steps}
        curves = {'training': training, 'held-out clips': held_out}
        plot(os.path.join(self.folder, 'loss.png'), {'loss': curves}, 'step')

    def picture(self, step, picture):
        """Keep a picture uint8 [H,W,3] of dreams."""
        if RANK == 0:
            write_picture(os.path.join(self.folder, f'dream_{step:07d}.png'), picture)
        if self.board:
            self.board.add_image('dream', picture, step, dataformats='HWC')

    def close(self):
        if self.board:
            self.board.close()
