"Everything `pip` needs, read from `settings.ini`."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
repository, site = cfg['git_url'], cfg['doc_host'] + cfg['doc_baseurl']

def absolute(found):
    "A link of README.md that also works where the repository is not around it"
    kind = 'raw' if found[1].startswith('!') else 'blob'
    return f'{found[1]}{repository}/{kind}/{cfg["branch"]}/{found[2]}'

readme = re.sub(r'(!?\[[^]]*\]\()(?!\w+:|#)([^)]+)', absolute, (here/'README.md').read_text(encoding='utf-8'))

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=site, license='Apache-2.0',
    project_urls={'Documentation': site, 'Source': repository, 'Issues': f'{repository}/issues',
                  'Changelog': f'{repository}/blob/{cfg["branch"]}/CHANGELOG.md'},
    long_description=readme, long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.11',
                 'Programming Language :: Python :: 3.12', 'Programming Language :: Python :: 3.13',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Typing :: Typed'],
    packages=find_packages(include=['dreamplus*']), package_data={'dreamplus': ['published/*.json', 'py.typed']},
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['dreamplus=dreamplus._modidx:d']},
    zip_safe=False)
