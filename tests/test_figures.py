"Every figure with the data that spoil figures: twenty settings with long names, one setting, one seed, missing values, a diverged run, nothing at all; and files that repeat byte by byte."
import math
import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from lora_study import figures, plots
from lora_study.config import BadInput
from lora_study.verdicts import compare

def runs(settings, seeds=3, long=False):
    "Invented runs: settings × seeds, values that follow the rank and some noise"
    rng, out = np.random.default_rng(0), []
    for k in range(settings):
        r = 1 + k if settings > 6 else 2**k
        name = f'attention+feed_forward with init=orthogonal_{k}, learning_rate={.0001*(k+1):g}, scheduler=cosine_with_restarts' if long else f's{k}'
        for s in range(seeds):
            nll = .1 + .2/r + .01*rng.random()
            row = dict(setting=name, lora_r=r, seed=s, test_nll=nll, base_nll=1.5, gain=1.5 - nll, forgetting=.3 + .05*k + .05*rng.random(), use_peft=k > 0, trainable_params=13568.*r,
                       probe_peak_rss_bytes=7e8 + 1e6*r*rng.random(), train_s=60 + r + 5*rng.random(), adapter_bytes=6e4*r, checkpoint_bytes=2e5*r, merge_base_merged_bytes=7e6)
            out.append(row | {f'{m}_batch_{b}_{kind}_s': .003*b**.5*(1.5 if m == 'adapter' else 1)*(1 + .1*rng.random()) for m in ('base', 'adapter', 'merged') for b in (1, 8) for kind in ('prefill', 'token')})
    return pd.DataFrame(out)

MEASURED = [c for c in runs(1) if c not in ('setting', 'lora_r', 'seed', 'use_peft')]

def missing(df): # two of the first setting's values are not there, and all of the last's
    return df.assign(**{c: df[c].where(~((df.seed < 2) & (df.lora_r == df.lora_r.min()) | (df.lora_r == df.lora_r.max()))) for c in MEASURED})

def diverged(df): # one run's quality is no number; what it cost was measured
    return df.assign(**{c: df[c].where(~((df.seed == 1) & (df.lora_r == 2)), np.inf) for c in ('test_nll', 'forgetting')}, gain=df.gain.where(~((df.seed == 1) & (df.lora_r == 2)), -np.inf))

CASES = dict(twenty=runs(20, long=True), one_setting=runs(1), one_seed=runs(4, 1), missing=missing(runs(4)), diverged=diverged(runs(4)))

def grid(df): # each run at several learning rates; as many as settings, where there are many
    rates = [1e-3] if df.lora_r.nunique() == 1 else list(np.geomspace(1e-4, 1e-1, 20 if len(df) > 50 else 5))
    return pd.concat([df.assign(learning_rate=float(f'{lr:.3g}'), test_nll=df.test_nll + .1*(math.log10(lr) + 2.4)**2) for lr in rates], ignore_index=True)

def curves(df): # loss that falls to the run's own
    def one(r):
        lost = not math.isfinite(r.test_nll)
        return [dict(setting=r.setting, seed=r.seed, step=k, value=7*math.exp(-k/20) + (.2 if lost else r.test_nll)) for k in range(1, 40 if lost else 101)] + [dict(setting=r.setting, seed=r.seed, step=40, value=math.nan)]*lost
    return pd.DataFrame([p for r in df.itertuples() for p in one(r)])

def verdicts(df):
    by = {n: g.set_index('seed').test_nll for n, g in df.groupby('setting', sort=False)}; first = next(iter(by))
    return [compare(x.where(np.isfinite(x)), by[first].where(np.isfinite(by[first])), (n, first), margin=.01) for n, x in by.items() if len(by) == 1 or n != first]

def layers(df): return pd.DataFrame([dict(module=f'layers.{i}.{r.setting}' if len(df) > 50 else f'layers.{i}.mlp.{m}', rank=r.lora_r, seed=r.seed, entropy_rank=r.lora_r*r.test_nll/(r.test_nll + .1) if math.isfinite(r.test_nll) else np.nan)
                                     for r in df.itertuples() for i in range(2) for m in ('q_proj', 'v_proj')])

def values(df): return pd.DataFrame([dict(module=f'layers.{i}.' + r.setting.replace('.', ''), seed=r.seed, value=math.exp(-k*r.test_nll) if math.isfinite(r.test_nll) else np.nan) for r in df.itertuples() for i in range(2) for k in range(8)])

def claims(df): return pd.DataFrame([dict(claim=f'C{k} {n}' if len(df) > 50 else f'C{k}', group=f'About {n}' if k % 3 == 0 else 'Rank', verdict=['CONFIRMED', 'REFUTED', 'INVALID-EDGE', 'INCONCLUSIVE', 'NOT-TESTABLE'][k % 5]) for k, n in enumerate(df.setting.unique())])

FIGURES = dict(
    rank_comparison=lambda d: figures.rank_comparison(d), frontier=lambda d: figures.frontier(d, ['setting'], band=(0, .01)), training_time=lambda d: figures.training_time(d, ['setting']), model_size=lambda d: figures.model_size(d, ['setting']),
    inference_latency=lambda d: figures.inference_latency(d, ['setting']), loss_bands=lambda d: figures.loss_bands(curves(d) if len(d) else d), rate_map=lambda d: figures.rate_map(grid(d) if len(d) else d), rate_lines=lambda d: figures.rate_lines(grid(d) if len(d) else d),
    forest=lambda d: figures.forest(verdicts(d) if len(d) else []), effective_rank=lambda d: figures.effective_rank(layers(d)), singular_spectra=lambda d: figures.singular_spectra(values(d)), forgetting_gain=lambda d: figures.forgetting_gain(d, ['setting']),
    claims_overview=lambda d: figures.claims_overview(claims(d) if len(d) else d), metric_against=lambda d: plots.metric_against(d, 'lora_r', 'test_nll', 'base_nll'), metric_lines=lambda d: plots.metric_against(grid(d) if len(d) else d, 'learning_rate', 'test_nll', others=['setting']),
    quality_cost=lambda d: plots.quality_cost(d, ['setting'], 'trainable_params', 'test_nll'))

@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', FIGURES)
def test_reads_well(name, case):
    fig = FIGURES[name](CASES[case])
    for dpi in (100, 120, 200): # pages show it at the first two, files are saved at the last: hinted text would be wider there
        fig.set_dpi(dpi)
        assert plots.overlaps(fig) == [], f'at {dpi} dots an inch'
    assert fig.get_figwidth() == plots.WIDTH and min(t.get_fontsize() for t in fig.findobj(Text) if t.get_text()) >= 7
    assert len(fig.alt) > 20 and fig.caption and 'nan' not in fig.alt.lower().split()

@pytest.mark.parametrize('name', FIGURES)
def test_nothing_to_show(name):
    with pytest.raises(BadInput, match=r'expected') as e: FIGURES[name](CASES['one_seed'][:0])
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['rank_comparison', 'forest', 'rate_map'])
def test_same_bytes(name, tmp_path):
    "Twice from the same data, once under another style of the reader's: the same files; other data: others"
    with rc_context({'font.size': 19, 'axes.prop_cycle': plots.style.library['ggplot']['axes.prop_cycle'], 'svg.hashsalt': None}): first = FIGURES[name](CASES['diverged'])
    for k, fig in enumerate((first, FIGURES[name](CASES['diverged']), FIGURES[name](CASES['missing']))): plots.save(fig, tmp_path, f'f{k}')
    plots.save(first, tmp_path, 'again')
    for kind in ('png', 'svg'):
        one, two, other, again = ((tmp_path/f'{n}.{kind}').read_bytes() for n in ('f0', 'f1', 'f2', 'again'))
        assert one == two == again != other
    assert b'<dc:date>' not in (tmp_path/'f0.svg').read_bytes() and b'Matplotlib v' not in (tmp_path/'f0.svg').read_bytes() + (tmp_path/'f0.png').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith('f0')) == ['f0.png', 'f0.svg'], 'only whole files are left'

def linear(colour): return np.array([c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4 for c in to_rgb(colour)])

def lab(rgb): # CIE L*a*b*, D65
    x = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]) @ np.clip(rgb, 0, 1)/[.9505, 1, 1.089]
    f = np.where(x > .008856, np.cbrt(x), 7.787*x + 16/116)
    return np.array([116*f[1] - 16, 500*(f[0] - f[1]), 200*(f[1] - f[2])])

SIGHT = dict(all=np.eye(3), protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]], deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.01182, .04294, .968881]],
             tritan=[[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .3039]]) # Machado, Oliveira and Fernandes 2009

@pytest.mark.parametrize('sight', SIGHT)
def test_colours_keep_apart(sight):
    seen = [lab(np.array(SIGHT[sight]) @ linear(c)) for c in plots.COLOURS]
    assert min(np.linalg.norm(a - b) for k, a in enumerate(seen) for b in seen[:k]) > 10

def test_colours_on_white():
    "3 : 1, what WCAG 2.1 asks of graphical objects"
    assert min(1.05/(linear(c) @ [.2126, .7152, .0722] + .05) for c in plots.COLOURS) >= 3

def test_names_are_text():
    "Neither mathematics nor control characters reach the page or the SVG"
    df = CASES['one_seed'].assign(setting=[f'$x^{k}$ <b>&"\x00\n\u202e' for k in range(4)])
    fig = figures.training_time(df, ['setting'])
    assert plots.overlaps(fig) == [] and '$x^0$ <b>&"' in fig.axes[0].get_yticklabels()[0].get_text().replace('\n', '')

def test_svg_is_xml(tmp_path):
    from xml.etree import ElementTree
    df = CASES['one_seed'].assign(setting=[f'$x^{k}$ <b>&"\x00\n\u202e' for k in range(4)])
    plots.save(figures.forgetting_gain(df, ['setting']), tmp_path, 'odd')
    assert ElementTree.parse(tmp_path/'odd.svg').getroot().tag.endswith('svg')
