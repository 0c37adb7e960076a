"""Closed-form toy networks used by the golden vectors (written for the goldens; free to use in tests).

All of them take ``(hidden_states, timestep, class_labels=None)`` where ``hidden_states`` is (B, C, H, W) or
(B, C, T, H, W), ``timestep`` is (B,) in the model's own timestep unit, and ``s = timestep / time_scale``.
Their parameters are stored with every case (prefix ``net/`` or ``teacher/``), so nothing has to be re-drawn.
"""

import torch
import torch.nn as nn


def _bc(v, x):
    """(B,) or (C,)-style vector -> broadcastable against x with a leading batch dimension."""
    return v.reshape(v.shape[0], *([1] * (x.dim() - 1)))


class _Toy(nn.Module):
    def __init__(self, channels, num_classes=4, time_scale=1.0):
        super().__init__()
        self.channels = channels
        self.time_scale = time_scale
        self.amp = nn.Parameter(torch.ones(channels))
        self.emb = nn.Parameter(torch.zeros(num_classes + 1, channels))

    @property
    def dtype(self):
        return self.amp.dtype

    def randomize(self, seed, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        for _, p in sorted(self.named_parameters()):
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) * 0.5
        self.amp.data.add_(0.8)
        return self

    def base(self, x, timestep):
        """amp_c * sin(1.3 x + 0.7 s) + 0.25 cos(2 s) * roll(x, +1 along channels);  s = timestep / time_scale"""
        s = _bc(timestep.to(x.dtype) / self.time_scale, x)
        amp = self.amp.reshape(1, -1, *([1] * (x.dim() - 2)))
        return amp * torch.sin(1.3 * x + 0.7 * s) + 0.25 * torch.cos(2 * s) * torch.roll(x, 1, dims=1)

    def label(self, x, class_labels):
        if class_labels is None:
            return 0.0
        e = self.emb[class_labels]  # (B, C)
        return e.reshape(*e.shape, *([1] * (x.dim() - 2)))


class ToyVelocity(_Toy):
    """Velocity field u(x, t): base(x, t) + emb[label]."""

    def forward(self, hidden_states, timestep, class_labels=None):
        return self.base(hidden_states, timestep) + self.label(hidden_states, class_labels)


class ToyDX(_Toy):
    """N velocity grid points / polynomial coefficients, (B, N, C, *)."""

    def __init__(self, n, channels, **kw):
        super().__init__(channels, **kw)
        self.n = n
        self.gain = nn.Parameter(torch.zeros(n))
        self.offset = nn.Parameter(torch.zeros(n, channels))

    def forward(self, hidden_states, timestep, class_labels=None):
        b = self.base(hidden_states, timestep) + self.label(hidden_states, class_labels)
        extra = [1] * (hidden_states.dim() - 2)
        return b.unsqueeze(1) * (1 + 0.1 * self.gain.reshape(1, -1, 1, *extra)) + 0.3 * self.offset.reshape(
            1, self.n, self.channels, *extra
        )


class ToyGM(_Toy):
    """Gaussian mixture in velocity space: means (B,K,C,*), logweights (B,K,1,*) normalised over K,
    logstds (B,1,1,*ones)."""

    def __init__(self, k, channels, logstd=-1.0, **kw):
        super().__init__(channels, **kw)
        self.k = k
        self.logstd0 = logstd
        self.gain = nn.Parameter(torch.zeros(k))
        self.offset = nn.Parameter(torch.zeros(k, channels))
        self.wgain = nn.Parameter(torch.zeros(k))
        self.wbias = nn.Parameter(torch.zeros(k))
        self.lstd = nn.Parameter(torch.zeros(2))

    def forward(self, hidden_states, timestep, class_labels=None):
        x = hidden_states
        b = self.base(x, timestep) + self.label(x, class_labels)
        extra = [1] * (x.dim() - 2)
        means = b.unsqueeze(1) * (1 + 0.1 * self.gain.reshape(1, -1, 1, *extra)) + 0.5 * self.offset.reshape(
            1, self.k, self.channels, *extra
        )
        m = b.mean(dim=1, keepdim=True).unsqueeze(1)
        logits = self.wgain.reshape(1, -1, 1, *extra) * m + self.wbias.reshape(1, -1, 1, *extra)
        s = timestep.to(x.dtype) / self.time_scale
        logstds = self.logstd0 + 0.2 * self.lstd[0] + 0.2 * self.lstd[1] * s
        return {'means': means, 'logweights': logits.log_softmax(dim=1), 'logstds': logstds.reshape(-1, 1, 1, *extra)}
