"""A small agent on a framework, with its defaults: framework_agent.py FRAMEWORK MODEL SCENARIO.
Run it with -I: a file beside it has the name of the package of openai-agents."""
import subprocess
import sys

FRAMEWORK, MODEL, SCENARIO = sys.argv[1:]
PROMPT = f"cage-drill: {SCENARIO}"


def run(command: str, description: str) -> str:
    """Run a command of the shell."""
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout


def openai_agents():
    """Whole, then streamed: each its own tool loop."""
    import asyncio

    from agents import Agent, Runner, function_tool
    from agents.models.openai_provider import OpenAIProvider
    from agents.run import RunConfig
    agent = Agent(name="drill", instructions="Do it.", model=MODEL, tools=[function_tool(run)])
    config = RunConfig(model_provider=OpenAIProvider(), tracing_disabled=True)   # "lab/…" is a name

    async def both():
        whole = await Runner.run(agent, PROMPT, run_config=config)
        streamed = Runner.run_streamed(agent, PROMPT, run_config=config)
        async for _ in streamed.stream_events():
            pass
        return whole.final_output, streamed.final_output

    return asyncio.run(both())


def pydantic_ai():
    from pydantic_ai import Agent
    agent = Agent(f"openai:{MODEL}", instructions="Do it.", tools=[run])

    async def read(context, events):             # with it calls are streamed, to the agent's end
        async for _ in events:
            pass

    return (agent.run_sync(PROMPT).output,
            agent.run_sync(PROMPT, event_stream_handler=read).output)


whole_output, streamed_output = {"openai-agents": openai_agents, "pydantic-ai": pydantic_ai}[
    FRAMEWORK]()
assert whole_output == streamed_output, (whole_output, streamed_output)
print(whole_output)
