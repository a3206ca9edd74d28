.PHONY: style quality test ci oldest

style:  # repairs what can be repaired
	ruff check --fix .

quality:
	ruff check .
	mypy

test:
	pytest

ci:  # what every change must pass, in a fresh virtual environment
	bash .ci/run

oldest:  # the tests with the oldest versions that setup.cfg allows
	bash .ci/oldest
