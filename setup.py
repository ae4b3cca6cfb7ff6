"Everything about the package is in settings.ini; this only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    author_email=cfg['author_email'], license='Apache-2.0', keywords=cfg['keywords'], python_requires=f">={cfg['min_python']}",
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['lora_study', 'lora_study.*']),
    package_data={'lora_study': ['embedded/*', 'notebooks/*.ipynb', 'facts/*']},
    install_requires=cfg['requirements'].split(), extras_require={x: cfg[f'{x}_requirements'].split() for x in ('dev', 'eval', 'wandb', 'tensorboard', 'nvml')},
    entry_points={'console_scripts': cfg['console_scripts'].split()}, zip_safe=False)
