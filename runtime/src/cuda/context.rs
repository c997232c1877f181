//! A GPU at work: its context, one stream, memory, modules, graphs and events. All that is asked of the driver is asked here.
//!
//! Copies wait until they are done. They and the stream are ordered: it is a blocking stream, and the copies' is the legacy
//! default stream (CUDA Driver API, "Stream synchronization behavior"). So what a launch reads is written before, and what it
//! wrote is read after.
//!
//! Invariants:
//! 1. The driver's functions have the types of their list (`driver`), and may be called from any thread that has the
//!    context; `Context::ask` makes it current before each call.
//! 2. A handle lives as long as the object that holds it, each of which holds the context; nobody else has it.
//! 3. Places that the driver writes or reads in this program's memory are borrowed during the call and as large as it is
//!    told. Kernels keep to the memory of their parameters: an artifact is code, and loading one is trusting it.
//! 4. After a sticky error nothing is asked any more but to let go.

use super::driver::{Driver, Failure, Functions, Gpu, Version, is_out_of_memory, is_sticky, until_nul};
use crate::device::DeviceError;
use crate::gpu::{Call, with_maps};
use crate::tensor_map::{Element, Fill, Swizzle, TENSOR_MAP_BYTES, TensorMap};
use cudarc::driver::sys;
use std::ffi::{CString, c_void};
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, OnceLock};

/// Bytes of an upload's pieces: what is mapped from a file need not be in memory as a whole.
pub(super) const PIECE_BYTES: usize = 64 << 20;

/// Bytes of dynamic shared memory that a kernel has without asking (CUDA C++ Programming Guide, "Shared Memory").
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// Bytes of each of the JIT compiler's logs.
const LOG_BYTES: usize = 16 << 10;

/// A GPU with its context and stream.
pub struct Context {
    driver: Driver,
    /// The GPU.
    pub gpu: Gpu,
    name: String,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// What broke it.
    lost: OnceLock<String>,
}

// SAFETY: the handles are the driver's, which any thread may use that has the context (invariant 1).
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Makes a GPU ready to work.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn open(driver: Driver, gpu: Gpu) -> Result<Arc<Context>, Failure> {
        let name = format!("cuda:{}", gpu.number);
        let (mut context, device) = (ptr::null_mut(), gpu.device);
        // SAFETY: invariants 1 and 3; the device is one that the driver gave.
        let code = unsafe { (driver.functions.cuDevicePrimaryCtxRetain)(&mut context, device) };
        driver.checked(&name, "cuDevicePrimaryCtxRetain", code)?;
        // From here on dropping it gives the context back.
        let lost = OnceLock::new();
        let mut this = Context { driver, gpu, name, context, stream: ptr::null_mut(), lost };
        let mut stream = ptr::null_mut();
        // SAFETY: invariants 1 and 3; 0 asks for a blocking stream.
        this.ask("cuStreamCreate", |driver| unsafe { (driver.cuStreamCreate)(&mut stream, 0) })?;
        this.stream = stream;
        Ok(Arc::new(this))
    }

    /// Asks the driver, with this context current. What breaks the context is remembered: from then on all is refused.
    fn ask(&self, call: &'static str, ask: impl FnOnce(&Functions) -> u32) -> Result<(), Failure> {
        if let Some(lost) = self.lost.get() {
            let said = format!("not done: the GPU failed before ({lost}); start the program again");
            return Err(Failure { device: self.name.clone(), call, code: 0, said });
        }
        // SAFETY: invariant 2.
        let code = match unsafe { (self.driver.functions.cuCtxSetCurrent)(self.context) } {
            0 => ask(&self.driver.functions),
            refused => refused,
        };
        let asked = self.driver.checked(&self.name, call, code);
        if let Err(failure) = &asked
            && is_sticky(code)
        {
            let _ = self.lost.set(failure.to_string());
        }
        asked
    }

    /// Bytes of the GPU's memory that are free.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn free_bytes(&self) -> Result<u64, Failure> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: invariants 1 and 3.
        self.ask("cuMemGetInfo_v2", |driver| unsafe { (driver.cuMemGetInfo_v2)(&mut free, &mut total) })?;
        Ok(free as u64)
    }

    /// A tensor map as this driver writes it.
    ///
    /// # Errors
    ///
    /// What the driver refuses.
    pub fn encode(&self, map: &TensorMap) -> Result<[u8; TENSOR_MAP_BYTES], Failure> {
        use sys::{
            CUtensorMapDataType as Data, CUtensorMapFloatOOBfill as Outside,
            CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion,
            CUtensorMapSwizzle as Swizzled,
        };
        let data = match map.dtype {
            Element::U8 => Data::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            Element::U16 => Data::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            Element::U32 => Data::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            Element::S32 => Data::CU_TENSOR_MAP_DATA_TYPE_INT32,
            Element::U64 => Data::CU_TENSOR_MAP_DATA_TYPE_UINT64,
            Element::S64 => Data::CU_TENSOR_MAP_DATA_TYPE_INT64,
            Element::F16 => Data::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Element::Bf16 => Data::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Element::F32 => Data::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Element::F64 => Data::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
        };
        let swizzle = match map.swizzle {
            Swizzle::None => Swizzled::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes32 => Swizzled::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes64 => Swizzled::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => Swizzled::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let outside = match map.fill {
            Fill::Zeros => Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            Fill::Nan => Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA,
        };
        // A row of 128 bytes is fetched into the cache as the line of 128 bytes that it is.
        let promotion = Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
        let rank = map.dims.len();
        if map.strides.len() + 1 != rank || map.tile.len() != rank || map.element_strides.len() != rank {
            unreachable!("a map of a kernel has lists of one length");
        }
        let mut made = sys::CUtensorMap { opaque: [0; 16] };
        let base: *mut c_void = ptr::without_provenance_mut(map.base as usize);
        // SAFETY: invariants 1 and 3: the lists are as long as the rank says. The address is only written down.
        self.ask("cuTensorMapEncodeTiled", |driver| unsafe {
            (driver.cuTensorMapEncodeTiled)(
                &mut made,
                data as u32,
                rank as u32,
                base,
                map.dims.as_ptr(),
                map.strides.as_ptr(),
                map.tile.as_ptr(),
                map.element_strides.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE as u32,
                swizzle as u32,
                promotion as u32,
                outside as u32,
            )
        })?;
        let mut bytes = [0; TENSOR_MAP_BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip(made.opaque) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Ok(bytes)
    }

    /// Waits until the stream has done everything.
    ///
    /// # Errors
    ///
    /// What failed since it was last asked.
    pub fn wait(&self) -> Result<(), Failure> {
        // SAFETY: invariants 1 and 2.
        self.ask("cuStreamSynchronize", |driver| unsafe { (driver.cuStreamSynchronize)(self.stream) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let Functions { cuCtxSetCurrent, cuStreamDestroy_v2, cuDevicePrimaryCtxRelease_v2, .. } =
            self.driver.functions;
        // SAFETY: invariants 1 and 2: whoever had a handle of this context held the context.
        unsafe {
            cuCtxSetCurrent(self.context);
            // Null, where opening failed, would be the default stream.
            if !self.stream.is_null() {
                cuStreamDestroy_v2(self.stream);
            }
            cuDevicePrimaryCtxRelease_v2(self.gpu.device);
        }
    }
}

/// Memory of a GPU.
pub struct Buffer {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Buffer {
    /// So many zeroed bytes.
    ///
    /// # Errors
    ///
    /// [`DeviceError::OutOfMemory`]; or what else the driver says.
    pub fn zeroed(context: &Arc<Context>, bytes: usize) -> Result<Buffer, DeviceError> {
        // The driver allocates nothing of no size.
        let (mut address, bytes) = (0, bytes.max(1));
        // SAFETY: invariants 1 and 3.
        let asked =
            context.ask("cuMemAlloc_v2", |driver| unsafe { (driver.cuMemAlloc_v2)(&mut address, bytes) });
        match asked {
            Ok(()) => {}
            Err(failure) if is_out_of_memory(failure.code) => {
                let available = context.free_bytes()?;
                return Err(DeviceError::OutOfMemory { needed: bytes as u64, available });
            }
            Err(failure) => return Err(failure.into()),
        }
        let buffer = Buffer { context: context.clone(), address, bytes };
        // SAFETY: invariants 1 and 2: the memory was just given, as large.
        context.ask("cuMemsetD8_v2", |driver| unsafe { (driver.cuMemsetD8_v2)(address, 0, bytes) })?;
        Ok(buffer)
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Writes bytes from `at` on, in pieces.
    ///
    /// # Errors
    ///
    /// What the driver says.
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Failure> {
        let begin = self.within(at..at + bytes.len());
        for (number, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            let (to, from) = (begin + (number * PIECE_BYTES) as u64, piece.as_ptr().cast());
            // SAFETY: invariants 1 to 3: the range is in this buffer. The driver has read the piece when it returns.
            self.context.ask("cuMemcpyHtoD_v2", |driver| unsafe {
                (driver.cuMemcpyHtoD_v2)(to, from, piece.len())
            })?;
        }
        Ok(())
    }

    /// Reads as many bytes as `bytes` has, from `at` on.
    ///
    /// # Errors
    ///
    /// What the driver says; what the stream failed in before, too.
    ///
    /// # Panics
    ///
    /// If there are not as many.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Failure> {
        let from = self.within(at..at + bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: invariants 1 to 3: the range is in this buffer.
        self.context.ask("cuMemcpyDtoH_v2", |driver| unsafe {
            (driver.cuMemcpyDtoH_v2)(bytes.as_mut_ptr().cast(), from, bytes.len())
        })
    }

    fn within(&self, range: Range<usize>) -> u64 {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        self.address + range.start as u64
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: invariants 1 and 2. The driver waits for what uses it. A failure leaves nothing to do (invariant 4).
        let _ = self.context.ask("cuMemFree_v2", |driver| unsafe { (driver.cuMemFree_v2)(self.address) });
    }
}

/// Loaded code.
pub struct Module {
    context: Arc<Context>,
    module: sys::CUmodule,
    /// By the number of the phase.
    phases: Vec<Loaded>,
}

/// An entry of a module.
struct Loaded {
    /// Its kernel's.
    name: String,
    function: sys::CUfunction,
}

// SAFETY: as the context's.
unsafe impl Send for Module {}
// SAFETY: as the context's; nothing of a module changes once it is loaded.
unsafe impl Sync for Module {}

/// Code, and the form that it has.
pub enum Image<'a> {
    /// Machine code.
    Cubin(&'a [u8]),
    /// PTX.
    Ptx(&'a str),
}

impl Module {
    /// Loads code; PTX is compiled.
    ///
    /// # Errors
    ///
    /// What the driver says, with the log of its compiler.
    pub fn load(context: &Arc<Context>, image: &Image<'_>) -> Result<Module, Failure> {
        use sys::CUjit_option as Jit;
        let text; // Ended by a 0, which the driver looks for. A text with one inside ends there.
        let image: *const c_void = match image {
            Image::Cubin(bytes) => bytes.as_ptr().cast(),
            Image::Ptx(ptx) => {
                let ptx = ptx.as_bytes().split(|&byte| byte == 0).next().unwrap_or_default();
                text = CString::new(ptx).expect("cut before the first 0");
                text.as_ptr().cast()
            }
        };
        let (mut errors, mut notes) = (vec![0u8; LOG_BYTES], vec![0u8; LOG_BYTES]);
        let mut options = [
            Jit::CU_JIT_ERROR_LOG_BUFFER,
            Jit::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
            Jit::CU_JIT_INFO_LOG_BUFFER,
            Jit::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
        ];
        // A value is a pointer, or a number in its place.
        let size: *mut c_void = ptr::without_provenance_mut(LOG_BYTES);
        let mut values = [errors.as_mut_ptr().cast(), size, notes.as_mut_ptr().cast(), size];
        let mut module = ptr::null_mut();
        // SAFETY: invariants 1 and 3: the lists are of one length, the logs as large as they say. The image is a text that
        // ends, or machine code, which says itself how long it is: an artifact is code, and loading one is trusting it.
        let loaded = context.ask("cuModuleLoadDataEx", |driver| unsafe {
            let (options, values) = (options.as_mut_ptr(), values.as_mut_ptr());
            (driver.cuModuleLoadDataEx)(&mut module, image, 4, options, values)
        });
        loaded.map_err(|mut failure| {
            for log in [errors, notes].map(|log| until_nul(&log)).iter().filter(|log| !log.is_empty()) {
                failure.said += &format!("; {log}");
            }
            failure
        })?;
        Ok(Module { context: context.clone(), module, phases: Vec::new() })
    }

    /// Looks up the next phase: its kernel's name, its own in the code, and the shared memory that it asks for.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn add(&mut self, name: &str, symbol: &str, shared_bytes: u32) -> Result<(), Failure> {
        let symbol = CString::new(symbol).expect("names of kernels have no 0");
        let mut function = ptr::null_mut();
        // SAFETY: invariants 1 to 3.
        self.context.ask("cuModuleGetFunction", |driver| unsafe {
            (driver.cuModuleGetFunction)(&mut function, self.module, symbol.as_ptr())
        })?;
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: invariants 1 and 2: the function is this module's.
            self.context.ask("cuFuncSetAttribute", |driver| unsafe {
                (driver.cuFuncSetAttribute)(function, attribute, shared_bytes as i32)
            })?;
        }
        self.phases.push(Loaded { name: name.to_string(), function });
        Ok(())
    }

    /// Launches a grid on the stream, without waiting for it.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Launch`]; of an earlier launch's fault too, if it is seen only now.
    pub fn launch(&self, call: &Call) -> Result<(), DeviceError> {
        let Call { phase, ctas, threads, shared_bytes, params, maps, dependent } = call;
        let Loaded { name, function } = &self.phases[*phase];
        let failed =
            |failure: Failure| DeviceError::Launch { kernel: name.clone(), said: failure.to_string() };
        let maps =
            maps.iter().map(|map| self.context.encode(map).map_err(failed)).collect::<Result<Vec<_>, _>>();
        let params = with_maps(params, maps?);
        let mut bytes = params.len();
        // The keys are small numbers in the place of pointers (CUDA Driver API, "cuLaunchKernelEx").
        let key = |number: u32| ptr::without_provenance_mut::<c_void>(number as usize);
        let mut extra = [
            key(sys::CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT),
            params.as_ptr().cast_mut().cast(),
            key(sys::CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT),
            (&raw mut bytes).cast(),
            key(sys::CU_LAUNCH_PARAM_END_AS_INT),
        ];
        let early = *dependent && self.context.driver.version >= Version::DEPENDENT_LAUNCHES;
        let mut begins_early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: *ctas,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: *threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: *shared_bytes,
            hStream: self.context.stream,
            attrs: &mut begins_early,
            numAttrs: early.into(),
        };
        // SAFETY: invariants 1 to 3: the driver copies the parameters before it returns and writes nothing.
        let asked = self.context.ask("cuLaunchKernelEx", |driver| unsafe {
            (driver.cuLaunchKernelEx)(&config, *function, ptr::null_mut(), extra.as_mut_ptr())
        });
        asked.map_err(failed)
    }

    /// Records launches instead of doing them, with one of another module at the end.
    ///
    /// # Errors
    ///
    /// As [`Module::launch`]; or what the driver says of the recording.
    pub fn record(
        self: &Arc<Module>,
        calls: &[Call],
        end: Option<(&Arc<Module>, Call)>,
    ) -> Result<Graph, DeviceError> {
        let context = &self.context;
        // Relaxed, because a driver may load a kernel only when it is first launched, which other modes refuse.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: invariants 1 and 2.
        context.ask("cuStreamBeginCapture_v2", |driver| unsafe {
            (driver.cuStreamBeginCapture_v2)(context.stream, mode)
        })?;
        let launched = calls.iter().try_for_each(|call| self.launch(call));
        let launched = launched.and_then(|()| end.iter().try_for_each(|(module, call)| module.launch(call)));
        let mut recorded = ptr::null_mut();
        // Also where a launch was refused: the stream records until it is told to stop.
        // SAFETY: invariants 1 to 3.
        let ended = context.ask("cuStreamEndCapture", |driver| unsafe {
            (driver.cuStreamEndCapture)(context.stream, &mut recorded)
        });
        let mut graph = ptr::null_mut();
        let made = launched.and_then(|()| {
            ended?;
            // SAFETY: invariants 1 to 3.
            Ok(context.ask("cuGraphInstantiateWithFlags", |driver| unsafe {
                (driver.cuGraphInstantiateWithFlags)(&mut graph, recorded, 0)
            })?)
        });
        if !recorded.is_null() {
            // SAFETY: invariants 1 and 2: it was just made, and what was instantiated is a copy.
            let _ = context.ask("cuGraphDestroy", |driver| unsafe { (driver.cuGraphDestroy)(recorded) });
        }
        made?;
        Ok(Graph { module: self.clone(), _end: end.map(|(module, _)| module.clone()), graph })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: invariants 1 and 2. A failure leaves nothing to do (invariant 4).
        let _ = self.context.ask("cuModuleUnload", |driver| unsafe { (driver.cuModuleUnload)(self.module) });
    }
}

/// Recorded launches.
pub struct Graph {
    module: Arc<Module>,
    /// Its code is the graph's too.
    _end: Option<Arc<Module>>,
    graph: sys::CUgraphExec,
}

// SAFETY: as the context's.
unsafe impl Send for Graph {}

impl Graph {
    /// Does on the stream what was recorded, without waiting for it.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn launch(&self) -> Result<(), Failure> {
        let context = &self.module.context;
        // SAFETY: invariants 1 and 2; as for a launch.
        context.ask("cuGraphLaunch", |driver| unsafe { (driver.cuGraphLaunch)(self.graph, context.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: invariants 1 and 2. A failure leaves nothing to do (invariant 4).
        let _ = self
            .module
            .context
            .ask("cuGraphExecDestroy", |driver| unsafe { (driver.cuGraphExecDestroy)(self.graph) });
    }
}

/// A mark in the stream, with the time at which the GPU came to it.
pub struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

impl Event {
    /// Puts a mark behind all that was launched.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn record(context: &Arc<Context>) -> Result<Event, Failure> {
        let mut event = ptr::null_mut();
        // SAFETY: invariants 1 and 3; 0 asks for one that has a time.
        context.ask("cuEventCreate", |driver| unsafe { (driver.cuEventCreate)(&mut event, 0) })?;
        let this = Event { context: context.clone(), event };
        // SAFETY: invariants 1 and 2.
        context.ask("cuEventRecord", |driver| unsafe { (driver.cuEventRecord)(event, context.stream) })?;
        Ok(this)
    }

    /// Seconds from another mark to this one, both of which the stream has passed.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn seconds_since(&self, before: &Event) -> Result<f64, Failure> {
        let mut milliseconds = 0.0;
        // SAFETY: invariants 1 to 3.
        self.context.ask("cuEventElapsedTime", |driver| unsafe {
            (driver.cuEventElapsedTime)(&mut milliseconds, before.event, self.event)
        })?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: invariants 1 and 2. A failure leaves nothing to do (invariant 4).
        let _ =
            self.context.ask("cuEventDestroy_v2", |driver| unsafe { (driver.cuEventDestroy_v2)(self.event) });
    }
}
