"""Every operator on many fields, mapped and not, against reverse mode over reverse mode one point at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import natgrad as ng
from natgrad.operators import derivatives, divergence, gradient, laplacian, time_derivative, value_and_gradient

torch.set_num_threads(1)
D = torch.float64
POINTS = torch.tensor([[0.3, -0.7, 0.2], [-0.4, 0.9, 1.1]], dtype=D)
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=D)


W, A, B, C, V = normal(4, 3), normal(4, 4, 3), normal(4, 4), normal(2, 3), normal(4)


def mat(x):
    """(4, 4), invertible where it is used"""
    return torch.tanh(A @ x) + B + 3 * torch.eye(4, dtype=D)


def spd(x):
    return mat(x) @ mat(x).mT + torch.eye(4, dtype=D)


def near(x):
    """(3, 3), all entries apart"""
    return x[:, None] * torch.tensor([1.0, 2.0, 4.0], dtype=D) + torch.tensor([0.3, -0.1, 0.2], dtype=D)


torch.manual_seed(0)
MHA = nn.MultiheadAttention(4, 2, batch_first=True).double().requires_grad_(False)
ENCODER = nn.TransformerEncoderLayer(4, 2, 8, activation="gelu", dropout=0.0, batch_first=True).double()
ENCODER.requires_grad_(False)
CONV = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(0), nn.Linear(4, 2)).double().requires_grad_(False)


def net(*layers):
    return nn.Sequential(nn.Linear(3, 6), *layers, nn.Linear(6, 2)).double().requires_grad_(False)


class InPlace(nn.Module):
    def forward(self, x):
        h = torch.sin(x * 2)
        other = h
        h += x
        h[0] = h[1].clone() * x[2]
        return other.square() * h


class Buffered(nn.Module):
    """Writes its input into a constant buffer."""

    def forward(self, x):
        out = x.new_zeros(2, 3)
        out[0], out[1] = x.sin(), x * x[0]
        return out


def elementwise(f):
    return lambda x: f(x * 0.4 + 0.45) * x[0]


class Through(torch.autograd.Function):
    """sin with a backward of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0]


def held(x):
    """Where no_grad holds a part constant."""
    with torch.no_grad():
        size, first = x.square().sum(), x[0]
    return x * size + first * x**2


SMOOTH = (
    "sin cos tan asin acos atan sinh cosh tanh asinh atanh exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal "
    "square sigmoid erf erfc erfinv lgamma digamma sinc logit i0"
)
ACTIVATIONS = "silu gelu softplus elu selu celu mish logsigmoid tanhshrink softsign"
FIELDS = {
    # Python operators
    "a vector added to a number": lambda y: y[0] ** 2 * y[1] + torch.tensor([1.0, 2.0], dtype=D),
    "single precision added": lambda y: y[0] ** 2 * y[1] + torch.tensor([1.0, 2.0]),
    "integers added": lambda y: y[0] ** 2 * y[1] + torch.tensor([1, 2]),
    "a number less a vector": lambda y: torch.tensor([1.0, 2.0], dtype=D) - y[0] ** 3 * y[2],
    "a vector times a number": lambda y: torch.tensor([1.0, 2.0, 3.0], dtype=D) * y[0] ** 3 * y[2],
    "a matrix times a vector": lambda y: C * y * y[0],
    "sub of a scalar": lambda y: 3 - y * y,
    "rsub of a tensor": lambda y: V[:3] - y**2,
    "rdiv of a scalar": lambda y: 2 / (y + 3),
    "rdiv of a tensor": lambda y: C / (y + 3),
    "a quotient": lambda y: y / (2 + y.square().sum()),
    "divided by a matrix": lambda y: y.sin() / (C + 5),
    "tensor exponent": lambda y: (y + 2) ** torch.tensor([2.0, 0.5, -1.0], dtype=D),
    "wider exponent": lambda y: (y[0] + 2) ** torch.tensor([2.0, 0.5, -1.0], dtype=D),
    "integer exponent": lambda y: y ** torch.tensor([0, 1, 3]),
    "exponents of the point": lambda y: (y + 2) ** (y * y),
    "a number to the point": lambda y: 2**y * 1.5 ** y[0],
    "a tensor to the point": lambda y: torch.tensor([1.5, 2.0], dtype=D) ** y[0],
    "in place": InPlace(),
    "into a buffer": Buffered(),
    "negated": lambda y: -(-y * y[0]) + +y,
    "unpacked": lambda y: (lambda a, b, c: a * b**2 * c.exp())(*y),
    "python sum": lambda y: sum(v * v * y[0] for v in y),
    "a comparison": lambda y: y * y * (y > 0) + (y[0] < 0.5) * y[1] ** 3,
    "numpy number": lambda y: np.float64(2) * y * y + np.float32(0.5) * y,
    "matmul operator": lambda y: W @ y * (y @ y),
    "rmatmul operator": lambda y: (y @ W.mT) @ B,
    "inner product": lambda y: y @ y.sin(),
    "matrix of the point": lambda y: (y[:, None] * y) @ y + near(y) @ near(y).mT @ y,
    "constant": lambda y: torch.ones(2, dtype=D),
    "linear": lambda y: y * 2,
    "remainder": lambda y: (y * y) % 0.3 + abs(y) * y,
    # elementwise
    **{name: elementwise(getattr(torch, name)) for name in SMOOTH.split()},
    "acosh": lambda y: torch.acosh(y + 3),
    **{name: elementwise(getattr(F, name)) for name in ACTIVATIONS.split()},
    "gelu by tanh": lambda y: F.gelu(y * y[0], approximate="tanh"),
    "softplus by beta": lambda y: F.softplus(y, beta=3.0),
    "elu of another slope": lambda y: F.elu(y, 0.7),
    "atan2": lambda y: torch.atan2(y, y[0] + 2),
    "hypot": lambda y: torch.hypot(y, y[0] + 2),
    "xlogy": lambda y: torch.xlogy(y + 2, y.square() + 1),
    "addcmul": lambda y: torch.addcmul(y, y.sin(), y[0]),
    "lerp": lambda y: torch.lerp(y.sin(), y.exp(), y[0]),
    "clamp": lambda y: (y * y * y[0]).clamp(-0.3, 0.3),
    "glu": lambda y: F.glu(W @ y),
    # reductions
    "sum of a number": lambda y: (y[0] ** 2).sum() * y[1],
    "radial sum": lambda y: torch.exp(-(y - C).square().sum(-1)).sum(),
    "sum over axes": lambda y: near(y).square().sum((0, 1)) + near(y).sin().sum(0, keepdim=True)[0, 1],
    "mean": lambda y: near(y).exp().mean(-1),
    "prod": lambda y: near(y).prod(1),
    "var and std": lambda y: near(y).var(1) + near(y).std(0),
    "max": lambda y: near(y).sin().max() + near(y).square().max(1).values,
    "amin": lambda y: near(y).sin().amin(0),
    "sort": lambda y: near(y).sin().sort(1).values @ V[:3],
    "topk": lambda y: near(y).sin().topk(2, 1).values,
    "median": lambda y: near(y).exp().median(1).values,
    "logsumexp": lambda y: torch.logsumexp(near(y), 1) + near(y).logsumexp(0, keepdim=True)[0, 0],
    "cumsum": lambda y: torch.cumsum(near(y).square(), 0),
    "cumprod": lambda y: torch.cumprod(near(y), 1),
    "norm": lambda y: near(y).norm() + torch.linalg.vector_norm(y) ** 3,
    "norm of order 3": lambda y: torch.linalg.vector_norm(near(y), 3, dim=1),
    "distances": lambda y: (y - C).norm(dim=-1),
    "normalize": lambda y: F.normalize(near(y), dim=1),
    "cosine similarity": lambda y: F.cosine_similarity(near(y), near(y.sin()), dim=1),
    # shapes
    "broadcast": lambda y: y[:, None] * y + y[:, None, None].sin(),
    "expand": lambda y: y.square().expand(2, -1) * C,
    "stack and cat": lambda y: torch.cat([torch.stack([y, V[:3], y.sin()]), C * y[0]]).square(),
    "hstack, vstack": lambda y: torch.vstack([torch.hstack([y, y[:1]]), V]) ** 2,
    "negative axes": lambda y: torch.stack([y, y.exp()], -1).unsqueeze(-2).squeeze(1).transpose(-1, 0).square(),
    "permute": lambda y: near(y)[None].permute(2, 0, 1).flip(0).roll(1, 2).square().flatten(1),
    "reshape": lambda y: near(y).reshape(-1).view(3, 3).square().unflatten(0, (1, 3)),
    "split": lambda y: sum(p.square().sum() * k for k, p in enumerate(near(y).split(1))) + near(y).unbind(1)[2] ** 2,
    "diagonal": lambda y: near(y).diagonal().square() + torch.diag_embed(y.sin()).sum(0) + near(y).tril().exp().trace(),
    "outer": lambda y: torch.outer(y, y.sin()) + torch.kron(y, y.cos()).reshape(3, 3),
    "einsum": lambda y: torch.einsum("i,ij,j->", y, near(y), y.sin()) + torch.einsum("ij,j->i", W[:3], y * y),
    "cross": lambda y: torch.linalg.cross(y, y.flip(0).sin()),
    "tensordot": lambda y: torch.tensordot(near(y), near(y.sin()), dims=([0], [1])),
    "conv": lambda y: CONV(y[[0, 1, 2, 0]][None].sin()),
    "pad": lambda y: F.pad(y * y, (1, 2), value=0.5).square(),
    # indexing
    "slices": lambda y: near(y)[1:, ::2] ** 2 + near(y)[..., None][0, 1],
    "lists": lambda y: near(y)[[0, 2]] ** 2 + y[[1]] * y[0],
    "advanced": lambda y: near(y)[None].expand(2, 3, 3)[torch.tensor([0, 1]), :, torch.tensor([2, 0])].square(),
    "mask": lambda y: near(y)[:, torch.tensor([True, False, True])].exp(),
    "gather": lambda y: (
        near(y).gather(1, torch.tensor([[0], [2], [1]])) ** 2 + y.index_select(0, torch.tensor([1])) ** 3
    ),
    "where": lambda y: torch.where(y > 0, y**2, y.sin() * y[0]) + torch.where(y[0] > 0, y.exp(), 2.0),
    "masked fill": lambda y: near(y).masked_fill(torch.eye(3).bool(), 2.0).square() * y,
    "triu of a product": lambda y: (near(y) @ near(y)).triu(1),
    # matrices
    "det": lambda y: torch.linalg.det(mat(y)),
    "det of a method": lambda y: mat(y).det() * y[0],
    "slogdet": lambda y: torch.linalg.slogdet(mat(y))[1],
    "logabsdet by name": lambda y: torch.slogdet(mat(y)).logabsdet * y[0],
    "logdet": lambda y: torch.logdet(spd(y)),
    "solve": lambda y: torch.linalg.solve(mat(y), V),
    "solve with two": lambda y: torch.linalg.solve(mat(y), W @ y),
    "solve from the right": lambda y: torch.linalg.solve(mat(y), spd(y), left=False),
    "solve of a constant matrix": lambda y: torch.linalg.solve(B, (W @ y) ** 2),
    "inv": lambda y: torch.linalg.inv(mat(y)),
    "inverse of a batch": lambda y: torch.linalg.inv(torch.stack([mat(y), spd(y)])) @ (W @ y),
    "determinants times what has no rule": lambda y: torch.linalg.det(mat(y)) * torch.linalg.vector_norm(y),
    "solve beside what has no rule": lambda y: torch.linalg.solve(mat(y), V) * torch.linalg.vector_norm(y),
    "logdet beside what has no rule": lambda y: torch.logdet(spd(y)) * torch.linalg.vector_norm(y),
    "cholesky": lambda y: torch.linalg.cholesky(spd(y)),
    "log det by cholesky": lambda y: torch.linalg.cholesky(spd(y)).diagonal().log().sum(),
    "cholesky inverse": lambda y: torch.cholesky_inverse(torch.linalg.cholesky(spd(y))),
    "triangular solve": lambda y: torch.linalg.solve_triangular(torch.linalg.cholesky(spd(y)), V[:, None], upper=False),
    "eigh": lambda y: torch.linalg.eigh(spd(y)).eigenvalues.log(),
    "eigenvectors": lambda y: torch.linalg.eigh(spd(y)).eigenvectors.square(),
    "pinv": lambda y: torch.linalg.pinv(mat(y)[:, :2]),
    "lstsq": lambda y: torch.linalg.lstsq(mat(y)[:, :2], V[:, None]).solution,
    "svdvals": lambda y: torch.linalg.svdvals(mat(y)),
    "eigenvalues of no symmetric matrix": lambda y: torch.linalg.eigvals(mat(y)).real.sort().values,
    "qr": lambda y: torch.linalg.qr(mat(y)).R.square(),
    "lu": lambda y: torch.linalg.lu_factor(mat(y))[0].diagonal().abs().log(),
    "matrix exponential": lambda y: torch.linalg.matrix_exp(mat(y) * 0.2),
    "matrix power": lambda y: torch.linalg.matrix_power(mat(y), -2),
    "nuclear norm": lambda y: torch.linalg.matrix_norm(mat(y), "nuc"),
    # layers
    "layer norm": net(nn.LayerNorm(6), nn.Tanh()),
    "rms norm": net(nn.RMSNorm(6), nn.SiLU()),
    "group norm": lambda y: F.group_norm(near(y)[None].repeat(1, 2, 1), 2).square(),
    "instance norm": lambda y: F.instance_norm(near(y)[None]).exp(),
    "softmax": lambda y: torch.softmax(near(y), 1) @ V[:3] + F.log_softmax(near(y), -1)[0],
    "attention of its own": lambda y: torch.softmax(mat(y) @ spd(y).mT / 9, -1) @ mat(y),
    "fused attention": lambda y: F.scaled_dot_product_attention(*(m[None, None] for m in (mat(y), spd(y) / 9, mat(y)))),
    "multi-head attention": lambda y: MHA(mat(y)[None], mat(y)[None], spd(y)[None] / 9)[0],
    "transformer": lambda y: ENCODER(mat(y)[None]),
    "radial basis": lambda y: V[:2] @ torch.exp(-((y[None] - C) ** 2).sum(1)),
    "Fourier features": lambda y: torch.cat([torch.sin(math.pi * (W @ y)), torch.cos(math.pi * (W @ y))]) @ normal_8,
    "in-place activation": net(nn.SiLU(inplace=True), nn.ELU(0.7, True)),
    "hard boundary": lambda y: y[0] * (1 - y[0]) * TANH(y),
    "gated": lambda y: TANH(y) * y[:2] + (1 - TANH(y)) * y[1:].sin(),
    "fft": lambda y: torch.fft.rfft(near(y)).abs().square(),
    # what is held constant, and what has a backward of its own
    "no_grad": held,
    "detach": lambda y: y.detach() * y * y + y.data,
    "a backward of its own": lambda y: Through.apply(y) * y,
    "shapes of others": lambda y: y.square().view_as(y.sin()).expand_as(y[:, None] * y).reshape_as(near(y)) * y,
    "dtypes of others": lambda y: y.sin().to(y) * y.type_as(y) * torch.arange(3).to(y).view_as(y),
    "dtypes by name": lambda y: y.to(D) * y.double(),
    # complex values
    "complex wave": lambda y: torch.exp(1j * (y @ V[:3])) * y[0] ** 2,
    "complex product": lambda y: torch.complex(y.sin(), y * y[0]) ** 2,
    "modulus of a wave": lambda y: (torch.exp(1j * y) * (y[0] + 2) + 1).abs(),
    # operators of operators
    "biharmonic": lambda y: laplacian(lambda z: torch.exp(z[0] * z[1]) * z[2] ** 3, y),
    "gradient squared": lambda y: gradient(lambda z: torch.sin(z[0] * z[1]) + z[2] ** 3, y).square().sum(),
    "two points": lambda y: laplacian(lambda z: torch.sin(z @ y) * y[0], POINTS[1]),
    "another transform": lambda y: jacrev(lambda z: torch.sin(z[0] * z[1]) * z)(y),
}
normal_8 = normal(8)
TANH = net(nn.Tanh(), nn.Linear(6, 6), nn.GELU())


def close(got, expected):
    """Within 1e-9 of the largest entry."""
    assert got.shape == expected.shape
    largest = max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= 1e-9 * largest


def oracle(u, x):
    """u (…), ∂u (…, d) and ∂²u (…, d, d) by torch.func at one point; Re and Im apart where u is complex."""
    if not u(x).is_complex():
        return u(x), jacrev(u)(x), jacrev(jacrev(u))(x)
    re, im = (oracle(lambda y, part=part: part(u(y)), x) for part in (torch.real, torch.imag))
    return tuple(torch.complex(a, b) for a, b in zip(re, im))


@pytest.mark.filterwarnings("ignore:.*has no second derivative")
@pytest.mark.parametrize("name", FIELDS)
def test_operators_are_those_of_reverse_mode(name):
    u, weights = FIELDS[name], torch.tensor([0.0, 2.0, -1.0], dtype=D)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        points = [oracle(u, x) for x in POINTS]
    expected = [torch.stack(parts) for parts in zip(*points)]
    value, slope, bend = expected[0], expected[1].movedim(-1, 1), expected[2]
    second = bend.diagonal(dim1=-2, dim2=-1)
    several = {
        "derivatives": (lambda x: derivatives(u, x, weights), (value, slope, second @ weights.to(second.dtype))),
        "laplacian": (lambda x: laplacian(u, x), second.sum(-1)),
        "gradient": (lambda x: gradient(u, x), slope),
        "value": (lambda x: value_and_gradient(u, x), (value, slope)),
        "time": (lambda x: time_derivative(u, x, axis=1), slope[:, 1]),
        "mixed": (lambda x: gradient(lambda y: gradient(u, y)[0], x), bend[..., 0].movedim(-1, 1)),
    }
    if value.ndim == 1 and not value.is_complex():
        several["divergence"] = (lambda x: divergence(lambda y: gradient(u, y), x), second.sum(-1))
    for operator, wanted in several.values():
        for got in (vmap(operator)(POINTS), torch.no_grad()(vmap(operator))(POINTS), [operator(x) for x in POINTS]):
            if isinstance(got, list):
                got = tuple(map(torch.stack, zip(*got))) if isinstance(wanted, tuple) else torch.stack(got)
            for g, w in zip(got, wanted) if isinstance(wanted, tuple) else [(got, wanted)]:
                close(g, w)


class Determinants(nn.Module):
    """A matrix of orbitals, and something of it: with parameters under it and beside."""

    def __init__(self, of):
        super().__init__()
        torch.manual_seed(3)
        self.orbitals, self.out, self.of = nn.Linear(3, 16), nn.Linear(4, 1, bias=False), of
        self.shift = nn.Parameter(3 * torch.eye(4))

    def forward(self, x):
        m = torch.tanh(self.orbitals(x)).reshape(4, 4) + self.shift
        return self.of(self, m, x)


def by_permutations(m):
    """det of a (4, 4) matrix: torch has no third derivative of its own."""
    signs = {p: (-1) ** sum(a > b for i, a in enumerate(p) for b in p[i:]) for p in itertools.permutations(range(4))}
    return sum(sign * math.prod(m[i, j] for i, j in enumerate(p)) for p, sign in signs.items())


def normalised(m):
    centred = m - m.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()


OF_MATRICES = {
    "det": lambda s, m, x: torch.linalg.det(m),
    "slogdet": lambda s, m, x: torch.linalg.slogdet(m)[1],
    "logdet": lambda s, m, x: torch.logdet(m @ m.mT),
    "solve": lambda s, m, x: s.out(torch.linalg.solve(m, s.out.weight[0] * x[0])),
    "inv": lambda s, m, x: s.out(torch.linalg.inv(m)).sum(),
    "cholesky": lambda s, m, x: s.out(torch.linalg.cholesky(m @ m.mT)).sum(),
    "eigh": lambda s, m, x: torch.linalg.eigh(m @ m.mT).eigenvalues.log().square().sum(),
    "pinv": lambda s, m, x: torch.linalg.pinv(m[:, :2]).sum(),
    "det beside what has no rule": lambda s, m, x: torch.linalg.det(m) * torch.linalg.vector_norm(x),
    "slogdet beside what has no rule": lambda s, m, x: torch.linalg.slogdet(m)[1] * torch.linalg.vector_norm(x),
    "solve beside what has no rule": lambda s, m, x: torch.linalg.solve(m, m[0]).sum() * torch.linalg.vector_norm(x),
    "layer norm": lambda s, m, x: F.layer_norm(m, (4,)).sin().sum() * torch.linalg.vector_norm(x),
}


WITHOUT_TORCH = {
    "det": lambda s, m, x: by_permutations(m),
    "det beside what has no rule": lambda s, m, x: by_permutations(m) * torch.linalg.vector_norm(x),
    "layer norm": lambda s, m, x: normalised(m).sin().sum() * torch.linalg.vector_norm(x),
}


@pytest.mark.parametrize("name", OF_MATRICES)
def test_determinants_inside_a_metric(name):
    """Rows, products with them and df of a PDE, against torch.func one point at a time."""
    net, points = Determinants(OF_MATRICES[name]).double(), torch.rand(6, 3, generator=generator, dtype=D)
    params = {n: p.detach() for n, p in net.named_parameters()}
    same = Determinants(WITHOUT_TORCH.get(name, OF_MATRICES[name])).double()

    def residual(p, x):
        def u(y):
            return functional_call(same, p, (y,)).reshape(())

        return jacrev(jacrev(u))(x).trace() + jacrev(u)(x)[0] * u(x) - x[0]

    def pde(u, x):
        value, slope, bend = derivatives(lambda y: u(y).reshape(()), x)
        return bend + slope[0] * value - x[0]

    metric = ng.GaussNewton(net, {"inside": pde})
    loss = metric.observe({"inside": points})
    root = torch.stack([residual(params, x) for x in points]) / math.sqrt(6)
    rows = [jacrev(residual)(params, x) for x in points]
    matrix = torch.cat([torch.stack([r[n].reshape(-1) for r in rows]) for n in params], 1) / math.sqrt(6)
    close(loss, root @ root / 2)
    close(metric.vector_to_flat(metric.gradient()), matrix.mT @ root)
    close(metric.rows.matrix(), matrix)
    v = normal(matrix.shape[1])
    close(metric.rows.jvp(v), matrix @ v)
    close(metric.rows.vjp(root), matrix.mT @ root)


def test_determinants_against_closed_forms():
    """u = log det diag(1 + xᵢ²), det of a rotation times scales, and (A(x))⁻¹b of a triangular system."""

    def rotated(x):
        c, s = torch.cos(x[0]), torch.sin(x[0])
        turn = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        return turn @ torch.diag_embed(torch.stack([x[1] ** 2 + 1, x[2].exp()])) @ turn.mT

    def triangular(x):
        one = torch.ones_like(x[0])
        m = torch.stack([torch.stack([one, 0 * one]), torch.stack([x[0] * x[1], one])])
        return torch.linalg.solve(m, torch.stack([x[2] ** 3, one]))

    x, y, z = POINTS.mT  # det = (1 + y²)eᶻ; the solution is (z³, 1 − x y z³)
    det, grow = (1 + y**2) * z.exp(), 2 * z.exp()
    log = (2 - 2 * y**2) / (1 + y**2) ** 2
    close(vmap(lambda p: laplacian(lambda q: torch.linalg.det(rotated(q)), p))(POINTS), det + grow)
    for of in (lambda m: torch.linalg.slogdet(m)[1], torch.logdet):
        close(vmap(lambda p, of=of: laplacian(lambda q: of(rotated(q)), p))(POINTS), log)
        expected = torch.stack([0 * x, 2 * y / (1 + y**2), torch.ones_like(x)], 1)
        close(vmap(lambda p, of=of: gradient(lambda q: of(rotated(q)), p))(POINTS), expected)
    close(vmap(lambda p: laplacian(triangular, p))(POINTS), torch.stack([6 * z, -6 * x * y * z], 1))
    inverse = vmap(lambda p: laplacian(lambda q: torch.linalg.inv(torch.diag_embed(q + 2)).diagonal(), p))(POINTS)
    close(inverse, 2 / (POINTS + 2) ** 3)
