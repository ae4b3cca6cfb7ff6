"The site as a reader meets it, without Quarto: the project itself is clean, and dataset text that would act is shown as text everywhere."
import html, json, re, subprocess, sys
from pathlib import Path
import pytest, yaml
from conftest import ROOT, STUDY, cli
from lora_study import tracker
from lora_study.pages import for_quarto, opened_with
from lora_study.site import RULES, Site, check_links, check_references, check_requests, check_site, check_text, dressed, heading_id, made, prose, read_page, unfenced

SLY = ['<script>alert(1)</script>', '[x](javascript:alert(1))', '{{< include /etc/passwd >}}', '![](http://example.org/p.png)', '`code` and ```', 'a | b | c', '$math$ and $$more$$', '@fig-1',
       '<img src=x onerror=alert(1)>', '# heading', '{=html}', '<!-- -->', '&lt;b&gt;']

def test_the_site_is_clean():
    assert check_site(ROOT, (str(Path.home()) + '/',)) == []

def test_what_is_made_for_the_site_is_made_again_the_same():
    assert {p.name for p in made(ROOT)} == {'_datasets.md', '_formats.md', '_base.md'}
    assert dressed(ROOT) == {}

def test_front_matter_touches_nothing_else():
    path = next((ROOT/'results').glob('*/points/*.ipynb'))
    text = path.read_text(encoding='utf-8')
    again = json.loads(opened_with(text, dict(title='other')))
    assert ''.join(again['cells'][0]['source']) == '---\ntitle: "other"\n---'
    again['cells'][0] = json.loads(text)['cells'][0]
    assert json.dumps(again, indent=1, ensure_ascii=False) == text.rstrip('\n')

@pytest.fixture
def project(tmp_path):
    "A site of one page and one notebook, clean"
    (tmp_path/'settings.ini').write_text('console_scripts = lora-study-page=x')
    (tmp_path/'index.qmd').write_text('---\ntitle: Home\n---\n\n## One {#one}\n\n[n](n.ipynb#two) ![a picture](p.png)\n')
    (tmp_path/'p.png').write_bytes(b'')
    cell = lambda kind, *lines, **more: dict(cell_type=kind, id=f'c{abs(hash(lines))}', metadata={}, source=list(lines)) | more
    nb = dict(cells=[cell('raw', '---\n', 'title: N\n', '---'), cell('markdown', '## Two\n', 'text'), cell('code', '1', outputs=[dict(output_type='stream', name='stdout', text=['one\n'])], execution_count=None)],
              metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path/'n.ipynb').write_text(json.dumps(nb, indent=1))
    (tmp_path/'_quarto.yml').write_text('project:\n  render: [index.qmd, "*.ipynb"]\nexecute: {enabled: false}\nipynb-filters: [lora-study-page]\nwebsite:\n  navbar:\n    left: [index.qmd]\n  sidebar:\n    contents: "*.ipynb"\n'
                                        'format:\n  html:\n    theme: default\n    html-math-method: mathml\n')
    assert check_site(tmp_path) == []
    return tmp_path

FAULTS = [ # file, what is planted, what is said; the planted text stands on the reported line
    ('index.qmd', '[gone](nowhere.md)', 'a link to nowhere.md'), ('index.qmd', '[n](n.ipynb#three)', 'a link to #three'), ('index.qmd', '[o](#four)', 'a link to #four'),
    ('index.qmd', '[j](javascript:alert)', 'a link to javascript:alert'), ('index.qmd', '![](p.png)', 'a picture without a text'), ('index.qmd', '![x](https://example.org/x.png)', 'a request to another host'),
    ('index.qmd', '<script src="https://example.org/x.js"></script>', 'a request to another host'), ('index.qmd', '<iframe src="//example.org">', 'a request to another host'),
    ('index.qmd', 'see @fig-nine', 'a cross-reference @fig-nine'), ('index.qmd', 'see @tbl-nine', 'a cross-reference @tbl-nine'), ('index.qmd', 'a @citation', 'takes for a citation'),
    ('index.qmd', 'in /home/someone/x', 'a path or name of the machine'), ('index.qmd', 'on secret-host', 'a path or name of the machine'), ('index.qmd', '{{< include absent.md >}}', 'an include of absent.md'),
    ('index.qmd', 'a {{< video x >}}', 'a shortcode that runs'), ('index.qmd', 'a <seed> here', 'HTML that acts or vanishes'), ('index.qmd', '#| hide', 'a directive that readers would see'),
    ('n.ipynb', '[gone](nowhere.md)', 'a link to nowhere.md'), ('n.ipynb', '<b>', 'HTML that acts or vanishes'), ('n.ipynb', '/tmp/run-3/x', 'a path or name of the machine'), ('n.ipynb', '@sec-no', 'a cross-reference')]

@pytest.mark.parametrize('name,fault,said', FAULTS)
def test_a_planted_fault_is_reported_where_it_is(project, name, fault, said):
    path = project/name
    if name == 'index.qmd': path.write_text(path.read_text() + f'\nfine\n{fault}\n')
    else: # in prose and in a markdown output
        nb = json.loads(path.read_text())
        nb['cells'][1]['source'] += ['\n', 'fine\n', fault]
        nb['cells'][2]['outputs'].append(dict(output_type='display_data', metadata={}, data={'text/markdown': ['fine\n', fault]}))
        path.write_text(json.dumps(nb, indent=1))
    found = [p for p in check_site(project, ('secret-host',)) if said in p]
    spots = [i for i, l in enumerate(path.read_text().split('\n'), 1) if json.dumps(fault)[1:-1] in l or fault in l]
    assert sorted({int(p.split(':')[1]) for p in found}) == spots and all(p.startswith(f'{name}:') for p in found)

@pytest.mark.parametrize('old,new,said', [
    ('left: [index.qmd]', 'left: [gone.qmd]', 'navigation leads to gone.qmd'), ('render: [index.qmd', 'render: [also.qmd, index.qmd', 'render names also.qmd'), ('enabled: false', 'enabled: true', 'rendering would run notebooks'),
    ('theme: default', 'theme: cosmo', 'named themes load fonts'), ('html-math-method: mathml', 'html-math-method: mathjax', 'set by a script'), ('[lora-study-page]', '[no-such-filter]', 'no console script'),
    ('website:', 'website:\n  google-analytics: G-1', 'google-analytics calls another host')])
def test_a_setting_that_breaks_the_site_is_reported(project, old, new, said):
    path = project/'_quarto.yml'
    path.write_text(path.read_text().replace(old, new))
    found = [p for p in check_site(project) if said in p]
    assert len(found) == 1 and re.match(r'_quarto\.yml:\d+: .+: .+', found[0])

def test_what_the_filter_cannot_hide_is_reported(project):
    path = project/'n.ipynb'
    nb = json.loads(path.read_text())
    code = lambda source, *outputs: dict(cell_type='code', id=f'd{abs(hash(source))}', metadata={}, execution_count=None, source=[source], outputs=list(outputs))
    nb['cells'] += [code('#|hide'), code('# | hide'), code('1', dict(output_type='display_data', metadata={}, data={'text/html': ['<table>']})),
                    code('2', dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': {}, 'text/plain': ['w']})), code('#| export\n#| echo: false\n3')]
    path.write_text(json.dumps(nb, indent=1))
    assert [re.sub(r'n\.ipynb:\d+: ', '', p).partition(':')[0] for p in check_site(project)] == ['a directive that readers would see', 'an output that is HTML only, which the site leaves out', 'an output of application/vnd.jupyter.widget-view+json']
    (project/'_e.qmd').write_text('[no](gone.md)') # never rendered
    assert not any('_e.qmd' in p for p in check_site(project))

def test_front_matter_is_asked_of_points(project):
    (project/'results/s/points').mkdir(parents=True)
    (project/'results/s/points/a.ipynb').write_text((project/'n.ipynb').read_text())
    (project/'_quarto.yml').write_text((project/'_quarto.yml').read_text().replace('"*.ipynb"]', '"*.ipynb", "results/*/points/*.ipynb"]'))
    assert [p.split(': ')[1] for p in check_site(project)] == ['front matter without description, date, categories']
    (project/'empty.qmd').write_text('text')
    (project/'_quarto.yml').write_text((project/'_quarto.yml').read_text().replace('index.qmd,', 'index.qmd, empty.qmd,'))
    assert 'empty.qmd:1: front matter without title' in ''.join(check_site(project))

def test_the_console_way_says_it_and_exits_with_1(project):
    ask = lambda: subprocess.run([sys.executable, '-m', 'lora_study.site'], cwd=project, capture_output=True, text=True)
    assert ask().returncode == 0
    (project/'index.qmd').write_text('[x](gone.md)\n')
    done = ask()
    assert done.returncode == 1 and 'index.qmd:1: a link to gone.md' in done.stderr

def acting(page): # what would act on a page, by our rules
    site = Site(page.path.parent, {})
    return [what for rule in (check_references, check_text, check_requests) for _, _, what, _ in rule(site, page)] + [w for _, _, w, _ in check_links(site, page) if 'javascript' in w]

def test_dataset_text_that_would_act_is_text_in_every_output(folder):
    rows = [dict(prompt=f'{sly} {i}', completion=f'{SLY[(i + k) % len(SLY)]}') for i in range(4) for k, sly in enumerate(SLY)]
    (folder/'sly.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (folder/'tiny.yaml').write_text('dataset_name: sly.jsonl\ntrain_size: 24\nvalidation_size: 4\ntest_size: 8\ngenerate_size: 6\nmax_new_tokens: 4\nmax_steps: 2\neval_steps: 2\naxes:\n  lora_r: [2]\nseeds: [0]\n')
    done = cli('run', 'tiny.yaml')
    assert done.returncode == 0, done.stdout + done.stderr
    point, = (folder/'results/tiny/points').glob('*.ipynb')
    page = read_page(point)
    assert acting(page) == [] and acting(read_page(folder/'results/tiny/RESULTS.md')) == []
    shown = '\n'.join(p.text for p in page.parts if p.kind in ('shown', 'printed'))
    seen = html.unescape(shown)
    assert sum(sly in seen for sly in SLY) >= 4 # they are there, to be read
    for sly in SLY[:4] + SLY[8:9]: assert sly not in shown
    assert page.front['categories'] == ['study=tiny', 'lora_r=2', 'seed=0', 'base=embedded', 'data=sly.jsonl'] and page.front['nll'] > 0
    record = json.loads((folder/'results/tiny/records.jsonl').read_text()) # kept as it came
    assert record['status'] == 'done'
    raw = '\n'.join(p.text for p in page.parts) # and had it not been escaped, the rules would have seen it
    page.parts[1].text = '\n\n'.join(SLY)
    assert len(acting(page)) >= 6
