import setuptools

setuptools.setup()  # pyproject.toml has everything
