//! A driver for tests: the driver's functions, done by the PTX emulator. One GPU a thread, so that tests do not meet.
//!
//! It keeps to what NVIDIA's does and refuses what that refuses: launches with more shared memory than was asked for, copies
//! outside of allocations, work while the stream records, everything after a fault of a kernel. What it cannot show is that
//! NVIDIA's driver does what its manual says.
//!
//! Invariant: the pointers come from `context` and `driver`, which give live places, as large as they say.

use super::driver::{Driver, Functions, NoDriver, Version};
use crate::emulator::{Grid, Memory, Options, Program, Sm, Sums};
use crate::ptx;
use crate::tensor_map::{Element, Fill, Swizzle, TensorMap};
use cudarc::driver::sys;
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::ptr;
use sys::CUresult as Code;

/// Shared memory without asking.
const DEFAULT_SHARED: u32 = 48 << 10;

/// A grid as the driver was asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    function: usize,
    /// Its shape, and whether it may begin early.
    pub grid: Grid,
    params: Vec<u8>,
}

struct Function {
    program: Program,
    most_shared: u32,
}

/// A GPU, and what was asked of it.
pub struct Fake {
    /// Compute capability: major, minor.
    pub capability: (i32, i32),
    /// Bytes of shared memory that a CTA may use.
    pub shared_bytes: i32,
    /// Bytes of memory that are free.
    pub free: usize,
    /// A function, how often it still works, and what it says then.
    pub fault: Option<(&'static str, u32, u32)>,
    /// The functions called, in order.
    pub calls: Vec<&'static str>,
    /// Objects that were made and not yet given back.
    pub live: i64,
    memory: Memory,
    sizes: Vec<(u64, usize)>,
    modules: Vec<ptx::Module>,
    functions: Vec<Function>,
    recorded: Option<Vec<Launch>>,
    /// What was recorded.
    pub graphs: Vec<Vec<Launch>>,
    clock: f32,
    events: Vec<f32>,
    sticky: u32,
}

thread_local! {
    static FAKE: RefCell<Option<Fake>> = const { RefCell::new(None) };
}

/// The driver of this thread's GPU, which begins anew.
pub fn driver() -> Result<Driver, NoDriver> {
    let fake = Fake {
        capability: (8, 0),
        shared_bytes: 163 << 10,
        free: 1 << 30,
        fault: None,
        calls: Vec::new(),
        live: 0,
        memory: Memory::new(),
        sizes: Vec::new(),
        modules: Vec::new(),
        functions: Vec::new(),
        recorded: None,
        graphs: Vec::new(),
        clock: 0.0,
        events: Vec::new(),
        sticky: 0,
    };
    FAKE.set(Some(fake));
    restart()
}

/// The driver of this thread's GPU as it is.
pub fn restart() -> Result<Driver, NoDriver> {
    restart_as(Version(12_040))
}

/// The same, of that version.
pub fn restart_as(version: Version) -> Result<Driver, NoDriver> {
    Driver::start(version, FUNCTIONS)
}

/// This thread's GPU.
pub fn with<T>(with: impl FnOnce(&mut Fake) -> T) -> T {
    FAKE.with_borrow_mut(|fake| with(fake.as_mut().expect("`driver` was called")))
}

/// A call: noted, and refused if the test or an earlier fault says so.
fn call(name: &'static str, work: impl FnOnce(&mut Fake) -> Result<(), Code>) -> u32 {
    with(|fake| {
        fake.calls.push(name);
        if fake.sticky != 0 {
            return fake.sticky;
        }
        match &mut fake.fault {
            Some((of, 0, code)) if *of == name => return *code,
            Some((of, left, _)) if *of == name => *left -= 1,
            _ => {}
        }
        work(fake).map_or_else(|code| code as u32, |()| 0)
    })
}

/// A handle is a number that is not 0.
fn handle<T>(number: usize) -> *mut T {
    ptr::without_provenance_mut(number + 1)
}

fn number<T>(handle: *mut T) -> usize {
    handle.addr().wrapping_sub(1)
}

/// Writes a result to where the caller wants it.
fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
    // SAFETY: the invariant.
    unsafe { to.write(value) };
    Ok(())
}

impl Fake {
    fn launch(&mut self, launch: Launch) -> Result<(), Code> {
        if let Some(recorded) = &mut self.recorded {
            recorded.push(launch);
            return Ok(());
        }
        self.clock += 1.0;
        let sm = if self.capability.0 == 9 { Sm::Sm90a } else { Sm::Sm80 };
        let options = Options { sm, seed: 7, sums: Sums::default() };
        let program = &self.functions[launch.function].program;
        if program.launch(&launch.grid, &launch.params, &mut self.memory, &options).is_err() {
            // Seen by whoever waits, and from then on by everybody.
            self.sticky = Code::CUDA_ERROR_ILLEGAL_ADDRESS as u32;
        }
        Ok(())
    }

    /// Work on the legacy stream, which a stream that records does not allow.
    fn copying(&self, address: u64, bytes: usize) -> Result<(), Code> {
        let inside =
            |&(begin, size): &(u64, usize)| begin <= address && address + bytes as u64 <= begin + size as u64;
        match self.sizes.iter().any(inside) {
            _ if self.recorded.is_some() => Err(Code::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT),
            true => Ok(()),
            false => Err(Code::CUDA_ERROR_INVALID_VALUE),
        }
    }
}

unsafe extern "C" fn init(_: c_uint) -> u32 {
    call("cuInit", |_| Ok(()))
}

unsafe extern "C" fn error_name(code: u32, to: *mut *const c_char) -> u32 {
    let name = match code {
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        100 => c"CUDA_ERROR_NO_DEVICE",
        209 => c"CUDA_ERROR_NO_BINARY_FOR_GPU",
        218 => c"CUDA_ERROR_INVALID_PTX",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        _ => return Code::CUDA_ERROR_INVALID_VALUE as u32,
    };
    give(to, name.as_ptr()).map_or(1, |()| 0)
}

unsafe extern "C" fn error_string(_: u32, _: *mut *const c_char) -> u32 {
    Code::CUDA_ERROR_INVALID_VALUE as u32
}

unsafe extern "C" fn device_count(to: *mut c_int) -> u32 {
    call("cuDeviceGetCount", |_| give(to, 1))
}

unsafe extern "C" fn device_get(to: *mut sys::CUdevice, _: c_int) -> u32 {
    call("cuDeviceGet", |_| give(to, 0))
}

unsafe extern "C" fn device_name(to: *mut c_char, bytes: c_int, _: sys::CUdevice) -> u32 {
    let name = b"Emulated\0";
    assert!(name.len() <= bytes as usize);
    // SAFETY: the invariant, and the line above.
    call("cuDeviceGetName", |_| unsafe {
        to.cast::<u8>().copy_from(name.as_ptr(), name.len());
        Ok(())
    })
}

unsafe extern "C" fn device_attribute(to: *mut c_int, of: sys::CUdevice_attribute, _: sys::CUdevice) -> u32 {
    use sys::CUdevice_attribute as Attribute;
    call("cuDeviceGetAttribute", |fake| match of {
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => give(to, fake.capability.0),
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => give(to, fake.capability.1),
        Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => give(to, 2),
        Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => give(to, fake.shared_bytes),
        _ => Err(Code::CUDA_ERROR_INVALID_VALUE),
    })
}

unsafe extern "C" fn device_memory(to: *mut usize, _: sys::CUdevice) -> u32 {
    call("cuDeviceTotalMem_v2", |fake| give(to, fake.free))
}

unsafe extern "C" fn context_retain(to: *mut sys::CUcontext, _: sys::CUdevice) -> u32 {
    call("cuDevicePrimaryCtxRetain", |fake| {
        fake.live += 1;
        give(to, handle(0))
    })
}

unsafe extern "C" fn context_release(_: sys::CUdevice) -> u32 {
    call("cuDevicePrimaryCtxRelease_v2", |fake| {
        fake.live -= 1;
        Ok(())
    })
}

unsafe extern "C" fn context_set(_: sys::CUcontext) -> u32 {
    0
}

unsafe extern "C" fn memory_info(free: *mut usize, total: *mut usize) -> u32 {
    call("cuMemGetInfo_v2", |fake| {
        give(total, fake.free)?;
        give(free, fake.free)
    })
}

unsafe extern "C" fn memory_alloc(to: *mut sys::CUdeviceptr, bytes: usize) -> u32 {
    call("cuMemAlloc_v2", |fake| {
        fake.free = fake.free.checked_sub(bytes).ok_or(Code::CUDA_ERROR_OUT_OF_MEMORY)?;
        fake.live += 1;
        let address = fake.memory.allocate("device memory", bytes);
        // What another program left there: not zero, and not to be read by kernels.
        fake.memory.write(address, &vec![0xA5; bytes]);
        fake.memory.forget(address, bytes);
        fake.sizes.push((address, bytes));
        give(to, address)
    })
}

unsafe extern "C" fn memory_free(address: sys::CUdeviceptr) -> u32 {
    call("cuMemFree_v2", |fake| {
        let at = fake.sizes.iter().position(|&(begin, _)| begin == address);
        let (_, bytes) = fake.sizes.swap_remove(at.ok_or(Code::CUDA_ERROR_INVALID_VALUE)?);
        fake.memory.release(address);
        fake.free += bytes;
        fake.live -= 1;
        Ok(())
    })
}

unsafe extern "C" fn memory_set(address: sys::CUdeviceptr, value: c_uchar, bytes: usize) -> u32 {
    call("cuMemsetD8_v2", |fake| {
        fake.copying(address, bytes)?;
        fake.memory.write(address, &vec![value; bytes]);
        Ok(())
    })
}

unsafe extern "C" fn copy_to_device(to: sys::CUdeviceptr, from: *const c_void, bytes: usize) -> u32 {
    call("cuMemcpyHtoD_v2", |fake| {
        fake.copying(to, bytes)?;
        // SAFETY: the invariant.
        fake.memory.write(to, unsafe { std::slice::from_raw_parts(from.cast(), bytes) });
        Ok(())
    })
}

unsafe extern "C" fn copy_to_host(to: *mut c_void, from: sys::CUdeviceptr, bytes: usize) -> u32 {
    call("cuMemcpyDtoH_v2", |fake| {
        fake.copying(from, bytes)?;
        // SAFETY: the invariant.
        unsafe { to.cast::<u8>().copy_from(fake.memory.read(from, bytes).as_ptr(), bytes) };
        Ok(())
    })
}

unsafe extern "C" fn stream_create(to: *mut sys::CUstream, flags: c_uint) -> u32 {
    assert_eq!(flags, 0, "a stream that does not block is not ordered with the copies");
    call("cuStreamCreate", |fake| {
        fake.live += 1;
        give(to, handle(0))
    })
}

unsafe extern "C" fn stream_destroy(_: sys::CUstream) -> u32 {
    call("cuStreamDestroy_v2", |fake| {
        fake.live -= 1;
        Ok(())
    })
}

unsafe extern "C" fn stream_wait(_: sys::CUstream) -> u32 {
    call("cuStreamSynchronize", |_| Ok(()))
}

unsafe extern "C" fn capture_begin(_: sys::CUstream, _: sys::CUstreamCaptureMode) -> u32 {
    call("cuStreamBeginCapture_v2", |fake| {
        fake.recorded = Some(Vec::new());
        Ok(())
    })
}

unsafe extern "C" fn capture_end(_: sys::CUstream, to: *mut sys::CUgraph) -> u32 {
    call("cuStreamEndCapture", |fake| {
        fake.live += 1;
        let recorded = fake.recorded.take().ok_or(Code::CUDA_ERROR_ILLEGAL_STATE)?;
        fake.graphs.push(recorded);
        give(to, handle(fake.graphs.len() - 1))
    })
}

unsafe extern "C" fn graph_make(to: *mut sys::CUgraphExec, graph: sys::CUgraph, _: c_ulonglong) -> u32 {
    call("cuGraphInstantiateWithFlags", |fake| {
        fake.live += 1;
        give(to, handle(number(graph)))
    })
}

unsafe extern "C" fn graph_destroy(_: sys::CUgraph) -> u32 {
    call("cuGraphDestroy", |fake| {
        fake.live -= 1;
        Ok(())
    })
}

unsafe extern "C" fn graph_launch(graph: sys::CUgraphExec, _: sys::CUstream) -> u32 {
    call("cuGraphLaunch", |fake| {
        let launches = fake.graphs[number(graph)].clone();
        launches.into_iter().try_for_each(|launch| fake.launch(launch))
    })
}

unsafe extern "C" fn graph_free(_: sys::CUgraphExec) -> u32 {
    call("cuGraphExecDestroy", |fake| {
        fake.live -= 1;
        Ok(())
    })
}

unsafe extern "C" fn module_load(
    to: *mut sys::CUmodule,
    image: *const c_void,
    count: c_uint,
    options: *mut sys::CUjit_option,
    values: *mut *mut c_void,
) -> u32 {
    call("cuModuleLoadDataEx", |fake| {
        // SAFETY: the invariant; images of tests are texts that end.
        let text = unsafe { CStr::from_ptr(image.cast()) }.to_str().unwrap_or_default();
        if text.starts_with('\u{7f}') {
            return Err(Code::CUDA_ERROR_NO_BINARY_FOR_GPU);
        }
        let module = ptx::Module::parse(text).map_err(|error| {
            // SAFETY: the invariant: two lists of that length, of which the first value is the log of errors, the second its
            // size.
            let (options, values) = unsafe {
                let options = std::slice::from_raw_parts(options, count as usize);
                (options, std::slice::from_raw_parts(values, count as usize))
            };
            assert_eq!(options[0], sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER);
            let log = format!("{error}\0");
            assert!(log.len() <= values[1].addr());
            // SAFETY: the invariant, and the line above.
            unsafe { values[0].cast::<u8>().copy_from(log.as_ptr(), log.len()) };
            Code::CUDA_ERROR_INVALID_PTX
        })?;
        fake.live += 1;
        fake.modules.push(module);
        give(to, handle(fake.modules.len() - 1))
    })
}

unsafe extern "C" fn module_unload(_: sys::CUmodule) -> u32 {
    call("cuModuleUnload", |fake| {
        fake.live -= 1;
        Ok(())
    })
}

unsafe extern "C" fn module_function(
    to: *mut sys::CUfunction,
    module: sys::CUmodule,
    name: *const c_char,
) -> u32 {
    call("cuModuleGetFunction", |fake| {
        // SAFETY: the invariant.
        let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap_or_default();
        let kernel = fake.modules[number(module)].kernel(name).ok_or(Code::CUDA_ERROR_NOT_FOUND)?;
        fake.functions.push(Function { program: Program::new(kernel), most_shared: DEFAULT_SHARED });
        give(to, handle(fake.functions.len() - 1))
    })
}

unsafe extern "C" fn function_attribute(
    of: sys::CUfunction,
    attribute: sys::CUfunction_attribute,
    to: c_int,
) -> u32 {
    assert_eq!(attribute, sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
    call("cuFuncSetAttribute", |fake| {
        fake.functions[number(of)].most_shared = to as u32;
        Ok(())
    })
}

unsafe extern "C" fn launch(
    config: *const sys::CUlaunchConfig,
    function: sys::CUfunction,
    _: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> u32 {
    call("cuLaunchKernelEx", |fake| {
        // SAFETY: the invariant, of the configuration and its list of attributes.
        let (config, attributes) = unsafe {
            let config = *config;
            (config, std::slice::from_raw_parts(config.attrs, config.numAttrs as usize))
        };
        let dependent = attributes.iter().any(|attribute| {
            let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            assert_eq!(attribute.id, id);
            // SAFETY: the attribute's number says which of the union it is.
            unsafe { attribute.value.programmaticStreamSerializationAllowed == 1 }
        });
        // SAFETY: the invariant: five pointers, of which the second is to the parameters, the fourth to how many bytes they
        // are (CUDA Driver API, "cuLaunchKernelEx").
        let params = unsafe {
            let extra = std::slice::from_raw_parts(extra, 5);
            let keys = [extra[0], extra[2], extra[4]].map(|key| key.addr());
            assert_eq!(keys, [1, 2, 0]);
            std::slice::from_raw_parts(extra[1].cast::<u8>(), *extra[3].cast::<usize>())
        };
        let function = number(function);
        let dynamic_shared = config.sharedMemBytes;
        if dynamic_shared > fake.functions[function].most_shared {
            return Err(Code::CUDA_ERROR_INVALID_VALUE);
        }
        let ctas = [config.gridDimX, config.gridDimY, config.gridDimZ];
        let threads = [config.blockDimX, config.blockDimY, config.blockDimZ];
        let cluster = fake.functions[function].program.cluster();
        let grid = Grid { ctas, threads, cluster, dynamic_shared, dependent };
        fake.launch(Launch { function, grid, params: params.to_vec() })
    })
}

unsafe extern "C" fn tensor_map(
    to: *mut sys::CUtensorMap,
    data: u32,
    rank: c_uint,
    base: *mut c_void,
    dims: *const u64,
    strides: *const u64,
    tile: *const c_uint,
    element_strides: *const c_uint,
    interleave: u32,
    swizzle: u32,
    _: u32,
    fill: u32,
) -> u32 {
    // In the order of the driver's numbers (CUDA Driver API, "Data types used by CUDA driver").
    const TYPES: [Element; 10] = [
        Element::U8,
        Element::U16,
        Element::U32,
        Element::S32,
        Element::U64,
        Element::S64,
        Element::F16,
        Element::F32,
        Element::F64,
        Element::Bf16,
    ];
    const SWIZZLES: [Swizzle; 4] = [Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128];
    call("cuTensorMapEncodeTiled", |_| {
        assert_eq!(interleave, 0);
        let rank = rank as usize;
        // SAFETY: the invariant: lists of the rank's length, the strides one shorter.
        let map = unsafe {
            TensorMap {
                dtype: TYPES[data as usize],
                base: base.addr() as u64,
                dims: std::slice::from_raw_parts(dims, rank).to_vec(),
                strides: std::slice::from_raw_parts(strides, rank - 1).to_vec(),
                tile: std::slice::from_raw_parts(tile, rank).to_vec(),
                element_strides: std::slice::from_raw_parts(element_strides, rank).to_vec(),
                swizzle: SWIZZLES[swizzle as usize],
                fill: if fill == 0 { Fill::Zeros } else { Fill::Nan },
            }
        };
        let bytes = map.encode().map_err(|_| Code::CUDA_ERROR_INVALID_VALUE)?;
        let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        let mut opaque = [0; 16];
        opaque.iter_mut().zip(words).for_each(|(to, word)| *to = word);
        give(to, sys::CUtensorMap { opaque })
    })
}

unsafe extern "C" fn event_create(to: *mut sys::CUevent, _: c_uint) -> u32 {
    call("cuEventCreate", |fake| {
        fake.live += 1;
        fake.events.push(f32::NAN);
        give(to, handle(fake.events.len() - 1))
    })
}

unsafe extern "C" fn event_destroy(_: sys::CUevent) -> u32 {
    call("cuEventDestroy_v2", |fake| {
        fake.live -= 1;
        Ok(())
    })
}

unsafe extern "C" fn event_record(event: sys::CUevent, _: sys::CUstream) -> u32 {
    call("cuEventRecord", |fake| {
        fake.events[number(event)] = fake.clock;
        Ok(())
    })
}

unsafe extern "C" fn event_elapsed(to: *mut f32, from: sys::CUevent, until: sys::CUevent) -> u32 {
    call("cuEventElapsedTime", |fake| give(to, fake.events[number(until)] - fake.events[number(from)]))
}

const FUNCTIONS: Functions = Functions {
    cuInit: init,
    cuGetErrorName: error_name,
    cuGetErrorString: error_string,
    cuDeviceGetCount: device_count,
    cuDeviceGet: device_get,
    cuDeviceGetName: device_name,
    cuDeviceGetAttribute: device_attribute,
    cuDeviceTotalMem_v2: device_memory,
    cuDevicePrimaryCtxRetain: context_retain,
    cuDevicePrimaryCtxRelease_v2: context_release,
    cuCtxSetCurrent: context_set,
    cuMemGetInfo_v2: memory_info,
    cuMemAlloc_v2: memory_alloc,
    cuMemFree_v2: memory_free,
    cuMemsetD8_v2: memory_set,
    cuMemcpyHtoD_v2: copy_to_device,
    cuMemcpyDtoH_v2: copy_to_host,
    cuStreamCreate: stream_create,
    cuStreamDestroy_v2: stream_destroy,
    cuStreamSynchronize: stream_wait,
    cuStreamBeginCapture_v2: capture_begin,
    cuStreamEndCapture: capture_end,
    cuGraphInstantiateWithFlags: graph_make,
    cuGraphDestroy: graph_destroy,
    cuGraphLaunch: graph_launch,
    cuGraphExecDestroy: graph_free,
    cuModuleLoadDataEx: module_load,
    cuModuleUnload: module_unload,
    cuModuleGetFunction: module_function,
    cuFuncSetAttribute: function_attribute,
    cuLaunchKernelEx: launch,
    cuTensorMapEncodeTiled: tensor_map,
    cuEventCreate: event_create,
    cuEventDestroy_v2: event_destroy,
    cuEventRecord: event_record,
    cuEventElapsedTime: event_elapsed,
};
