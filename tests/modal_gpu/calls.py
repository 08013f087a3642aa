"""Functions, their calls and the containers that work for them, as the stand-in of Modal's service answers for them."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from tests.modal_gpu.world import Call, World


class Calls:
    """Beside `Objects`, with the same `world` and `task`."""

    world: World
    task: Any

    def _handle(self, function: str) -> pb.FunctionHandleMetadata:
        definition = self.world.functions.get(function)
        return pb.FunctionHandleMetadata(
            function_name=definition.function_name if definition else "",
            function_type=pb.Function.FUNCTION_TYPE_FUNCTION, definition_id=f"de-{function}",
            app_id=self.world.function_app[function],
            supported_input_formats=[pb.DATA_FORMAT_PICKLE], supported_output_formats=[pb.DATA_FORMAT_PICKLE],
        )  # fmt: skip

    def do_FunctionPrecreate(self, request: pb.FunctionPrecreateRequest) -> pb.FunctionPrecreateResponse:
        function = self.world.new("fu")
        self.world.function_app[function] = request.app_id
        return pb.FunctionPrecreateResponse(function_id=function, handle_metadata=self._handle(function))

    def do_FunctionCreate(self, request: pb.FunctionCreateRequest) -> pb.FunctionCreateResponse:
        function = request.existing_function_id or self.world.new("fu")
        data = request.function_data
        if not data.ranked_functions:
            first = pb.FunctionData.RankedFunction(rank=0, function=request.function)
            data = pb.FunctionData(function_name=request.function.function_name, ranked_functions=[first])
        self.world.functions[function] = data.ranked_functions[0].function
        self.world.function_app[function] = request.app_id
        return pb.FunctionCreateResponse(
            function_id=function, function=request.function, function_data=data, handle_metadata=self._handle(function)
        )

    def do_FunctionBindParams(self, request: pb.FunctionBindParamsRequest) -> pb.FunctionBindParamsResponse:
        function = self.world.new("fu")
        bound = pb.Function()
        bound.CopyFrom(self.world.functions[request.function_id])
        if request.function_options.HasField("resources"):
            bound.resources.CopyFrom(request.function_options.resources)
        self.world.functions[function] = bound
        self.world.function_app[function] = self.world.function_app[request.function_id]
        return pb.FunctionBindParamsResponse(bound_function_id=function, handle_metadata=self._handle(function))

    def do_FunctionMap(self, request: pb.FunctionMapRequest) -> pb.FunctionMapResponse:
        world = self.world
        call = Call(world.new("fc"), request.function_id, request.pipelined_inputs[0].input)
        world.calls[call.id] = call
        if world.start is not None:
            world.start(world, call)
        return pb.FunctionMapResponse(
            function_call_id=call.id,
            pipelined_inputs=[pb.FunctionPutInputsResponseItem(input_id=f"in-{call.id}", idx=0)],
        )

    async def do_FunctionGetOutputs(self, request: pb.FunctionGetOutputsRequest) -> pb.FunctionGetOutputsResponse:
        call = self.world.calls.get(request.function_call_id)
        if call is None:
            return pb.FunctionGetOutputsResponse(num_unfinished_inputs=0)
        try:
            await asyncio.wait_for(call.done.wait(), max(0.01, request.timeout))
        except TimeoutError:
            return pb.FunctionGetOutputsResponse(num_unfinished_inputs=1)
        assert call.output is not None
        return pb.FunctionGetOutputsResponse(outputs=[call.output], num_unfinished_inputs=0)

    def do_FunctionCallFromId(self, request: pb.FunctionCallFromIdRequest) -> pb.FunctionCallFromIdResponse:
        call = self.world.calls[request.function_call_id]
        facts = pb.FunctionCallHandleMetadata(app_id=self.world.function_app[call.function], function_id=call.function)
        return pb.FunctionCallFromIdResponse(function_call_id=call.id, num_inputs=1, metadata=facts)

    def do_FunctionCallGetInfo(self, request: pb.FunctionCallGetInfoRequest) -> pb.FunctionCallGetInfoResponse:
        call = self.world.calls[request.function_call_id]
        info = pb.FunctionCallInfo(function_call_id=call.id, total_inputs=1)
        (info.succeeded_inputs if call.output else info.pending_inputs).total = 1
        return pb.FunctionCallGetInfoResponse(info=info)

    def do_FunctionCallCancel(self, request: pb.FunctionCallCancelRequest) -> Empty:
        call = self.world.calls[request.function_call_id]
        self.world.finish(
            call, pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TERMINATED, exception="Input was cancelled")
        )
        if self.world.end is not None:
            self.world.end(self.world, call, request.terminate_containers)
        return Empty()

    # containers
    def do_ContainerHello(self, _: Any) -> Empty:
        return Empty()

    async def do_ContainerHeartbeat(self, _: Any) -> pb.ContainerHeartbeatResponse:
        await asyncio.sleep(0.5)
        return pb.ContainerHeartbeatResponse()

    async def do_FunctionGetInputs(self, _: Any) -> pb.FunctionGetInputsResponse:
        item = self.task.take()
        if item is None:
            return pb.FunctionGetInputsResponse(inputs=[pb.FunctionGetInputsItem(kill_switch=True)])
        return pb.FunctionGetInputsResponse(inputs=[item])

    def do_FunctionPutOutputs(self, request: pb.FunctionPutOutputsRequest) -> Empty:
        for item in request.outputs:
            self.task.gave(item)
        return Empty()

    def do_TaskResult(self, request: pb.TaskResultRequest) -> Empty:
        self.task.ended(request.result)
        return Empty()

    async def do_TaskClusterHello(self, request: pb.TaskClusterHelloRequest) -> pb.TaskClusterHelloResponse:
        return await self.task.join(request)
