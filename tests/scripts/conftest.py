"""One server for all tests that only ask it, and clients for it."""

import pytest


@pytest.fixture(scope="session")
def server():
    from tests.helpers.served import Running  # only the tests that serve pay for the import

    running = Running()
    yield running
    running.close()


@pytest.fixture
def client(server):
    import openai

    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client
