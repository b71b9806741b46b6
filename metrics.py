"""How good is a dream? PSNR and SSIM of frames, and the networks that judge: LPIPS, FID and FVD.

Frames are [...,C,H,W] in [0, 1]. Nothing is downloaded: a network whose weights are absent is left
out, and the command that fetches them is named.
"""
import math
import os
import re
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError

MAX_PSNR = 58.92  # 10 log10(12 * 255^2), rounding to 8 bits: what equal frames score, not infinity
NETWORKS = ('lpips', 'fid', 'fvd')
DISTANCES = ('fid', 'fvd')  # between two sets of frames; the other metrics compare frame with frame
WEIGHTS = {  # {network: (file in pretrained/ or in torch's cache, where it is published)}
    'vgg': ('vgg16-397923af.pth', 'https://download.pytorch.org/models/vgg16-397923af.pth'),
    'alex': ('alexnet-owt-7be5be79.pth',
             'https://download.pytorch.org/models/alexnet-owt-7be5be79.pth'),
    'inception': ('weights-inception-2015-12-05-6726825d.pth',
                  'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
                  'weights-inception-2015-12-05-6726825d.pth'),
    'i3d': ('i3d/i3d_torchscript.pt', 'https://www.dropbox.com/scl/fi/c5nfs6c422nlpj880jbmh/'
            'i3d_torchscript.pt?rlkey=x5xcjsrz0818i4qxyoglp5bb8&dl=1'),
}


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, one value for each frame."""
    mse = (a - b).square().mean(dim=(-3, -2, -1))
    return (-10 * torch.log10(mse.clamp(min=1e-12))).clamp(max=MAX_PSNR)


def ssim(a, b, window=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004), one value for each frame.

    Gaussian windows that fit inside the frame, as in scikit-image (torchmetrics adds a mirrored
    border and scores higher). A frame smaller than the window gets one of its own, odd, size.
    """
    *batch, C, H, W = a.shape
    largest = min(window, H, W)
    size = largest - (largest + 1) % 2
    distance = torch.arange(size, device=a.device) - size // 2
    weight = torch.softmax(-distance ** 2 / (2 * sigma ** 2), dim=0).to(a.dtype)

    def blur(x):
        x = F.conv2d(x, weight[None, None, :, None])
        return F.conv2d(x, weight[None, None, None, :])

    a = a.reshape(-1, 1, H, W)
    b = b.reshape(-1, 1, H, W)
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2  # keep the fractions finite where the frames are black, or flat
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(-2, -1)).reshape(*batch, C).mean(dim=-1)


def frechet(a, b):
    """Frechet distance of the Gaussians with the means and covariances of a [N,d] and b [M,d].

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((AB)^(1/2)), whose last term is the sum of the
    singular values of R_a R_b' where A = R_a' R_a: no root of a singular matrix, quick while N < d.
    """
    a, b = a.double(), b.double()
    if not torch.isfinite(torch.cat([a, b])).all():
        return math.nan
    R_a = torch.linalg.qr((a - a.mean(dim=0)) / (len(a) - 1) ** 0.5).R
    R_b = torch.linalg.qr((b - b.mean(dim=0)) / (len(b) - 1) ** 0.5).R
    between = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    overlap = torch.linalg.svdvals(R_a @ R_b.T).sum()
    return (between + R_a.square().sum() + R_b.square().sum() - 2 * overlap).item()


def interval(values, resamples=1000):
    """95 % interval [low, high] of the mean of values [n], by bootstrap (Efron 1979), repeatable."""
    values = np.asarray(values)
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return np.percentile(values[picks].mean(axis=1), [2.5, 97.5]).tolist()


# -----------------------------------------------------------------------------
# the networks that judge

def find_weights(name):
    """Path of a network's weights. Raises UserError with the command that fetches them."""
    file, url = WEIGHTS[name]
    for folder in ('pretrained', os.path.join(torch.hub.get_dir(), 'checkpoints')):
        path = os.path.join(folder, file)
        if os.path.exists(path):
            return path
    raise UserError(f"curl -L --create-dirs -o pretrained/{file} '{url}'")


def chunked(f, *clips, size=32):
    """f over the frames of clips [B,F,3,H,W], `size` frames at a time: -> [B,F,...]."""
    split = [x.flatten(0, 1).split(size) for x in clips]
    return torch.cat(list(map(f, *split))).unflatten(0, clips[0].shape[:2])


def lpips_network(net, device, frame_size):
    """LPIPS (Zhang et al. 2018) on net = vgg or alex: (a, b) of [B,F,3,H,W] -> [B,F]."""
    import lpips
    layers = torch.load(find_weights(net), map_location='cpu', weights_only=True)
    # the package ships the few weights on top; the trunk is torchvision's, whose features.3.weight
    # is slice1.3.weight here
    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).to(device)
    trunk = {name: layers[re.sub('slice.', 'features', name)] for name in network.net.state_dict()}
    network.net.load_state_dict(trunk)

    def distance(a, b):
        return network(a, b, normalize=True)[:, 0, 0, 0]

    blank = torch.zeros(1, 3, *frame_size, device=device)
    distance(blank, blank)  # frames too small for it fail here and not after the rollouts
    return partial(chunked, distance)


def fid_network(device):
    """InceptionV3's pool3 (Heusel et al. 2017): frames [B,F,3,H,W] -> [B,F,2048]."""
    from torch_fidelity import FeatureExtractorInceptionV3
    network = FeatureExtractorInceptionV3(
        'inception', ['2048'], feature_extractor_weights_path=find_weights('inception')).to(device)

    def features(frames):
        return network((frames * 255).round().byte())[0]

    return partial(chunked, features)


def fvd_network(device, num_frames):
    """I3D's features (Unterthiner et al. 2018): clips [B,F,3,H,W] -> [B,1,400]."""
    if num_frames < 10:
        raise UserError(f'it needs 10 predicted frames and here are {num_frames}: a larger --num_frames= has more')
    network = torch.jit.load(find_weights('i3d'), map_location=device).eval()

    def features(clips):
        result = []
        for clip in clips:
            x = F.interpolate(clip * 2 - 1, (224, 224), mode='bilinear').transpose(0, 1)
            result.append(network(x[None], rescale=False, resize=True, return_features=True))
        return torch.stack(result)

    return features


def load_networks(names, device, frame_size, num_frames, lpips_net='vgg'):
    """({name: network}, {name: why it is absent}) for `names` among NETWORKS.

    frame_size (H, W) and num_frames are those of the predicted clips.
    """
    load = {
        'lpips': partial(lpips_network, lpips_net, device, frame_size),
        'fid': partial(fid_network, device),
        'fvd': partial(fvd_network, device, num_frames),
    }
    networks, absent = {}, {}
    for name in names:
        try:
            networks[name] = load[name]()
        except (ImportError, RuntimeError) as e:  # the latter from a torchvision of another torch
            # torchvision would bring the newest torch with it: ask for the one that is here
            version = torch.__version__.split('+')[0]
            absent[name] = f"{e}: pip install -e '.[eval]' torch=={version}"
            if isinstance(e, RuntimeError):  # pip does not see that a CUDA build wants its like
                absent[name] += ', and torchvision from where this torch came from'
        except Exception as e:  # whatever is wrong with one of them, the others are given
            reason = str(e) or type(e).__name__
            absent[name] = reason.splitlines()[0]
    return networks, absent
