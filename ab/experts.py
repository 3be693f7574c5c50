"""A/B: grouped experts of many tokens. python -m ab.experts"""
import json, sys, time, os, functools
from concurrent.futures import ThreadPoolExecutor
import torch
from ds4.backends.cuda import nvrtc
from ds4.backends.cuda.kernels import gemm, gemm_clusters as gc, moe_gemm
from bench.kernels import timed
from bench.gpu_gemm import rand, plan, uniform, one, reference, error, check_experts
from bench.machine import describe

D, F, E, K, LIMIT = 4096, 2048, 256, 6, 10.0
TINY = "tiny" in sys.argv
if TINY: D, F, E = 256, 256, 8
NEW = gemm.source()
a = NEW.index("    } else if constexpr (FORMAT == MXFP4) {"); b = NEW.index("    } else if constexpr (FORMAT == MXFP8) {")
OLDPAIR = NEW[:a] + '''    } else if constexpr (FORMAT == MXFP4) {
        u32 word = w[M / 4];
        constexpr int left = 12 - 4 * (M % 4);
        return mul2((word << left & 0x80008000) | (shifted(word, left - 3) & 0x0E000E00), scale);
''' + NEW[b:]
FAST = NEW
OLDPAIR = OLDPAIR.replace("__fdividef(gate, 1 + __expf(-gate))", "gate / (1 + __expf(-gate))")
now = {"s": NEW}
real_source = gemm.source
gemm.source = lambda main="gemm": now["s"] if main == "gemm" else real_source(main)
base_kernel = gemm._kernel.__wrapped__
kernels = {}
def kernel(build, device):
    key = (id(now["s"]), build)
    if key not in kernels: kernels[key] = base_kernel(build, device)
    return kernels[key]
gemm._kernel = kernel
VARIANTS = {"as it was": OLDPAIR, "unpack, division": FAST}
CL = lambda tokens: text_of(tokens, ())
real = gc.source.__wrapped__
@functools.cache
def text_of(tokens, pairs):
    s = real(tokens)
    for a, b in pairs:
        assert a in s, a
        s = s.replace(a, b)
    return s
changed = lambda *pairs: lambda tokens: text_of(tokens, pairs)
look = lambda n: ("// Where gemm_clusters.cu's threads", f"#undef LOOK\n#define LOOK {n}\n//")
CLUSTERS = {"clusters": CL,
  "128 B": changed(("L2::256B", "L2::128B")),
  "no hint": changed((".L2::256B", "")),
  "scales not asked for": changed(("for (int r = lane; r < ROWS; r += 32) {", "for (int r = lane; r < 0; r += 32) {")),
  "look 1": changed(look(1)),
  "look 4": changed(look(4)),
}
OTHER = {8192: ["no hint", "look 1"], 2048: ["128 B", "no hint", "scales not asked for", "look 1"], 4096: ["no hint", "look 1", "look 4"], 1024: ["look 1"], 256: ["look 1"]}
OTHER[512] = OTHER[2048]
WITHOUT = {"without unpacking": changed(("pair<(m)>(c.w[0], c.scale[0], c.bias[0])", "c.w[0][(m) * BITS / 16] + c.scale[0]"), ("pair<(m)>(c.w[1], c.scale[1], c.bias[1])", "c.w[1][(m) * BITS / 16] + c.scale[1]")),
  "without results": changed(("    if constexpr (GATED) {\n        u8* to", "    float summed = 0;\n    for (int i = 0; i < N / 2; i++) summed += acc[i];\n    if (summed != 123.456f) return;\n    if constexpr (GATED) {\n        u8* to"))}
cl = {"s": CL}
gc.source = lambda tokens: cl["s"](tokens)
cbase = gc._kernel.__wrapped__
ckernels = {}
def ckernel(build, device):
    key = (id(cl["s"]), build)
    if key not in ckernels: ckernels[key] = cbase(build, device)
    return ckernels[key]
gc._kernel = ckernel

def old(which, ws, x, p, tokens=None):
    now["s"] = VARIANTS[which]
    return moe_gemm.each_expert(ws, x, p, LIMIT, tokens or moe_gemm.tile_tokens(ws[0], len(p.order)))

forced = {"n": None}
def new(which, ws, x, p, tokens=None):
    cl["s"] = CLUSTERS[which]
    forced["n"] = tokens
    return gc.each_expert(ws, x, p, LIMIT)

OUT = open("out/experts.jsonl", "a") if os.path.isdir("out") else None
of = gc.Tiles.of.__func__
gc.Tiles.of = classmethod(lambda cls, plan, experts, tokens=None: of(cls, plan, experts, tokens or forced["n"]))
def row(**r):
    print(json.dumps(r), flush=True)
    if OUT: OUT.write(json.dumps(FACTS | r) + "\n"); OUT.flush()

def case(kind, ws, T):
    ids = uniform(T, K, E)
    p, x = plan(ids, E), (torch.randn(T, D, device="cuda") / 8).half()
    xp = gemm.permute(x, ws[0])
    calls = {}
    
    for v in ["clusters", *(OTHER.get(T, []) if kind[0] == "mxfp4" else [])]: calls[v] = functools.partial(new, v, ws, xp, p)
    if T == 2048:
        for n in (128,): calls[f"clusters, tiles of {n}"] = functools.partial(new, "clusters", ws, xp, p, n)
    for v in VARIANTS: calls[v] = functools.partial(old, v, ws, xp, p)
    torch.cuda.empty_cache()
    want = old("unpack, division", ws, xp, p)
    first = old("as it was", ws, xp, p).clone()
    res = {}
    for name, f in calls.items():
        got = f()
        torch.cuda.synchronize()
        same = (got == want).float().mean().item()
        rel = (float((got - first).norm()) / (float(first.norm()) + 1e-30))
        res[name] = (same, rel)
    for e in (0, E - 1):
        rows = p.order[p.offsets[e]: p.offsets[e + 1]].long()
        w = reference((one(m, e) for m in ws), x[rows // K], LIMIT, p.weights[rows])
        if "clusters" in calls:
            print("  float64 error", e, error(calls["clusters"]()[rows], w), error(first[rows], w))
    us = {n: [] for n in calls}
    for _ in range(2):
        for n, f in calls.items():
            us[n].append(round(timed("cuda", [f], 7) * 1e6, 1))
    for n in calls:
        row(bench="prefill experts", kind=kind[0] + str(kind[1]), tokens=T, variant=n, us=us[n], equal=res[n][0], difference=res[n][1])
    if "clusters" in calls:
        forced["n"] = None
        t = gc.Tiles.of(p, E)
        inputs = torch.empty(t.rows(), D, dtype=torch.float16, device="cuda")
        hidden = torch.zeros(t.rows(), F, dtype=torch.float16, device="cuda")
        each = torch.empty(T * K, D, device="cuda")
        parts = {"plan": lambda: gc.Tiles.of(p, E), "fill": lambda: t.fill(xp, inputs),
                 "gate+up": lambda: gc.product(ws[0], ws[1], inputs, hidden, t, LIMIT, gemm.spread(ws[2])),
                 "down": lambda: gc.product(ws[2], None, hidden, each, t)}
        cl["s"], forced["n"] = CL, None
        for n, f in parts.items():
            row(bench="prefill experts", kind=kind[0] + str(kind[1]), tokens=T, part=n, us=round(timed("cuda", [f], 7) * 1e6, 1))
        if TINY and 0:
            for name, text in WITHOUT.items():
                cl["s"] = text
                for n in ("gate+up", "down"):
                    row(bench="prefill experts", kind=kind[0] + str(kind[1]), tokens=T, part=n + " " + name, us=round(timed("cuda", [parts[n]], 7) * 1e6, 1))
        cl["s"] = CL
        print("  tiles", t.tiles[0].tolist(), "of rows", T * K)

def warm(kinds):
    start = time.time()
    chip = gemm.chip(0)
    arch = f"--gpu-architecture={nvrtc._architecture()}"
    jobs = []
    for k in kinds:
        for tok in gc.SIZES:
            texts = [CL]
            if k[0] == "mxfp4": texts += [CLUSTERS[n] for n in OTHER[{256: 8192, 128: 4096, 64: 2048}[tok]]]
            for text in texts:
                for g in (True, False):
                    jobs.append((text(tok), (arch, *gc.Build(*k, g, tok).options())))
        for s in VARIANTS.values() if k in kinds else [FAST]:
            for t in (32, 64, 128):
                for g in (True, False):
                    b_ = gemm.Build(*k, t, 2, g, False, True)
                    jobs.append((s, (arch, *b_.options(chip))))
    jobs = sorted(dict.fromkeys(jobs), key=lambda j: -("TOKENS=256" in str(j[1])))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda j: nvrtc._cached(*j), jobs))
    print(f"compiled {len(jobs)} in {time.time() - start:.1f} s", flush=True)

SMALL = [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("affine", 2, 128), ("affine", 3, 64), ("affine", 6, 64)]

def small():
    for kind in SMALL:
        for d, f in ((512, 256), (1024, 512)):
            ws = [rand(*kind, 8, *s) for s in ((f, d), (f, d), (d, f))]
            if kind[0] == "mxfp8": ws[2] = rand("affine", 6, 64, 8, d, f)
            for ids in (uniform(150, 3, 8), uniform(150, 2, 3), torch.full((300, 1), 5, device="cuda"), uniform(700, 3, 8), uniform(3, 2, 8)):
                T, k = ids.shape
                p, x = plan(ids, 8), torch.randn(T, d, device="cuda").half()
                xp = gemm.permute(x, ws[0])
                now["s"] = FAST
                want = moe_gemm.each_expert(ws, xp, p, 1.5, moe_gemm.tile_tokens(ws[0], len(p.order)))
                got = gc.each_expert(ws, xp, p, 1.5)
                torch.cuda.synchronize()
                if not torch.equal(got, want):
                    bad = (got != want)
                    print("DIFFERENT", kind, d, f, T, k, bad.float().mean().item(), ((got - want).norm() / want.norm()).item(), bad.any(1).float().mean().item(), bad.any(0).float().mean().item(), flush=True)
    print("small shapes checked", flush=True)

FACTS = describe("cuda")
torch.manual_seed(1)
begin = time.time()
kinds = [("mxfp4", 4, 32), ("affine", 2, 128)]
warm(kinds + [k for k in SMALL if k not in kinds])
sizes = (64, 256, 512, 1024, 2048, 4096, 8192) if not TINY else (40, 300)
small()
for kind in kinds:
    ws = [rand(*kind, E, *s) for s in ((F, D), (F, D), (D, F))]
    for T in (8192, 512, 2048, 4096, 1024, 256, 64) if not TINY else sizes:
        if kind[0] != "mxfp4" and T not in (512, 8192) and not TINY: continue
        case(kind, ws, T)
        print(f"  [{time.time() - begin:.0f} s]", flush=True)
    del ws
