"""Truths about the autoencoder: it is the published one, and any file of it loads."""
import pytest
import torch
from safetensors.torch import load_file, save_file

import vae as vae_module
from configurator import UserError
from vae import FILE, OLD_NAMES, VAE, WIDTHS, load_decoder, load_vae

SMALL = (32, 32, 64, 96)


def published(folder, widths):
    """diffusers' autoencoder of these widths, random, written to `folder` as it writes the published one."""
    AutoencoderKL = pytest.importorskip('diffusers').AutoencoderKL
    torch.manual_seed(0)
    n = len(widths)
    oracle = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4,
                           down_block_types=['DownEncoderBlock2D'] * n, up_block_types=['UpDecoderBlock2D'] * n)
    for name, p in oracle.named_parameters():
        if 'norm' in name or name.endswith('bias'):  # ones and zeros would hide a mistake
            torch.nn.init.normal_(p, mean=float('norm' in name and name.endswith('weight')), std=0.2)
    oracle.save_pretrained(folder)
    return oracle.eval()


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp('small')
    return published(folder, SMALL), folder


def close(ours, theirs):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@torch.no_grad()
def equal(ours, oracle, height, width, count=2):
    g = torch.Generator().manual_seed(1)
    frames = torch.rand(count, 3, height, width, generator=g) * 2 - 1
    latents = torch.randn(count, 4, height // 8, width // 8, generator=g)
    close(ours.encode(frames), oracle.encode(frames).latent_dist.mean * 0.18215)
    close(ours.decode(latents), oracle.decode(latents / 0.18215).sample.clamp(-1, 1))


@pytest.mark.parametrize('height, width', [(32, 32), (8, 8), (40, 64), (128, 24)])
def test_encodes_and_decodes_as_diffusers_does(small, height, width):
    oracle, folder = small
    equal(load_vae(folder), oracle, height, width)


def test_real_widths_encode_and_decode_as_diffusers_does(tmp_path):
    oracle = published(tmp_path, WIDTHS)
    equal(load_vae(tmp_path / FILE), oracle, 32, 24, count=1)


@pytest.mark.parametrize('shape', [(), (1, 1)])
def test_older_files_name_attention_otherwise(small, tmp_path, shape):
    oracle, folder = small
    state = load_file(folder / FILE)
    for old, new in OLD_NAMES.items():
        state = {k.replace(f'.{new}.', f'.{old}.'): v for k, v in state.items()}
    state = {k: v.reshape(*v.shape, *shape) if '.attentions.' in k and v.ndim == 2 else v for k, v in state.items()}
    assert sum(k.split('.')[-2] in OLD_NAMES for k in state) == 16
    save_file(state, tmp_path / 'old.safetensors')
    equal(load_vae(tmp_path / 'old.safetensors'), oracle, 16, 24)


def test_chunks_change_nothing_and_leading_dimensions_are_kept(small, monkeypatch):
    vae = load_vae(small[1])
    frames = torch.rand(2, 3, 3, 16, 24) * 2 - 1
    latents = vae.encode(frames)
    assert latents.shape == (2, 3, 4, 2, 3) and vae.decode(latents).shape == frames.shape
    assert vae.encode(frames[0, 0]).shape == (4, 2, 3) and vae.encode(frames[:0]).shape == (0, 3, 4, 2, 3)
    for frames_at_once in (1, 4):
        monkeypatch.setattr(vae_module, 'CPU_PIXELS', frames_at_once * 16 * 24)
        close(vae.encode(frames), latents)
        close(vae.decode(latents), torch.stack([vae.decode(z) for z in latents]))


def test_stays_fp32_under_autocast_and_takes_no_gradient(small):
    vae, frames = load_vae(small[1]), torch.rand(1, 3, 16, 16)
    plain = vae.encode(frames)
    with torch.autocast('cpu', torch.bfloat16):
        latents = vae.encode(frames.requires_grad_())
    assert torch.equal(latents, plain) and latents.dtype == torch.float32 and not latents.requires_grad


@pytest.mark.parametrize('path', ['', 'missing.safetensors', '/no/such/folder'])
def test_a_missing_file_says_how_to_get_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('VAE_MODEL_PATH', raising=False)
    with pytest.raises(UserError, match=f'^no autoencoder at .*hf download stabilityai/sd-vae-ft-mse {FILE}'):
        load_vae(path)


def test_the_path_may_come_from_the_environment(small, monkeypatch):
    monkeypatch.setenv('VAE_MODEL_PATH', str(small[1]))
    load_vae()


def test_pixels_need_no_decoder_and_latents_of_another_kind_have_none(small, monkeypatch):
    monkeypatch.setenv('VAE_MODEL_PATH', str(small[1]))
    assert load_decoder(3) is None and load_decoder(4) is not None
    with pytest.raises(UserError, match='latents of 16 channels: the autoencoder has 4'):
        load_decoder(16)


BIAS, FIRST = 'decoder.conv_out.bias', 'encoder.down_blocks.0.resnets.0.conv1.bias'


@pytest.mark.parametrize('wrong, message', [
    ({BIAS: torch.zeros(2)}, rf'does not fit this model: {BIAS} is \(2,\), not \(3,\)$'),
    ({BIAS: None}, rf'does not fit this model: {BIAS} is missing, not \(3,\)$'),
    ({f'x{i}': torch.zeros(1) for i in range(21)}, r'x17 is \(1,\), not expected and 11 more$'),
    ({FIRST: torch.zeros(2)}, 'is not a readable autoencoder file .ValueError'),  # the widths are read off this one
    ({FIRST: torch.tensor(0.0)}, 'is not a readable autoencoder file .TypeError'),
    ({BIAS: torch.tensor([1, float('nan'), 2])}, f'{BIAS} is not finite'),
])
def test_a_file_that_does_not_fit_names_its_tensors(small, tmp_path, wrong, message):
    state, file = load_file(small[1] / FILE) | wrong, tmp_path / 'wrong.safetensors'
    save_file({name: x for name, x in state.items() if x is not None}, file)
    with pytest.raises(UserError, match=f'^{file}.*{message}'):
        load_vae(file)


def test_a_file_of_another_kind_says_so(tmp_path):
    file = tmp_path / 'wrong.safetensors'
    file.write_bytes(b'not safetensors')
    with pytest.raises(UserError, match='is not a readable autoencoder file'):
        load_vae(file)


def test_a_frame_size_that_does_not_divide_by_8_is_refused():
    with pytest.raises(ValueError, match='^frames of 32x36: .* multiples of 8$'):
        VAE((32, 32, 32, 32)).encode(torch.zeros(1, 3, 32, 36))
