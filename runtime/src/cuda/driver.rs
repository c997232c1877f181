//! NVIDIA's driver: found at run time, asked for its version, and every function that is used looked up before the first use.
//!
//! What is missing is an error before any work, and nothing is looked up later: a driver that is too old cannot fail in the
//! middle of a step.
//!
//! Invariants:
//! 1. A function of this list has the C signature that NVIDIA's headers of CUDA 12.0 give it, and keeps it in every later
//!    driver: its name carries its version. The compiler compares the list with `cudarc`, which has it from those headers.
//! 2. Results are plain numbers here, not an enum of `cudarc`'s: a later driver may answer with a code that no header had.

use crate::device::DeviceError;
use crate::gpu::capability_text;
use cudarc::driver::sys;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::fmt;
use std::ptr;

/// A parameter's type in the headers, where this list has another.
macro_rules! header {
    ($ty:ty) => {
        $ty
    };
    ($ty:ty = $header:ty) => {
        $header
    };
}

macro_rules! functions {
    ($($name:ident($($ty:ty $(= $header:ty)?),*);)*) => {
        /// The driver's functions that are used, all of them. They give 0, or why not.
        #[derive(Clone, Copy)]
        #[expect(missing_docs, non_snake_case, reason = "the CUDA Driver API has these names and describes them")]
        pub struct Functions {
            $(pub $name: unsafe extern "C" fn($($ty),*) -> u32,)*
        }

        impl Functions {
            /// Looks every function up, or names the first that is not there.
            fn of(library: &Library) -> Result<Functions, &'static str> {
                Ok(Functions {
                    $($name: {
                        let _: unsafe fn($(header!($ty $(= $header)?)),*) -> sys::CUresult = sys::$name;
                        // SAFETY: the type is the function's by invariant 1, its result a number by invariant 2.
                        *unsafe { library.get(concat!(stringify!($name), "\0")) }
                            .map_err(|_| stringify!($name))?
                    },)*
                })
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuGetErrorName(u32 = sys::CUresult, *mut *const c_char);
    cuGetErrorString(u32 = sys::CUresult, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut sys::CUdevice, c_int);
    cuDeviceGetName(*mut c_char, c_int, sys::CUdevice);
    cuDeviceGetAttribute(*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    cuDeviceTotalMem_v2(*mut usize, sys::CUdevice);
    cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice);
    cuDevicePrimaryCtxRelease_v2(sys::CUdevice);
    cuCtxSetCurrent(sys::CUcontext);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAlloc_v2(*mut sys::CUdeviceptr, usize);
    cuMemFree_v2(sys::CUdeviceptr);
    cuMemsetD8_v2(sys::CUdeviceptr, c_uchar, usize);
    cuMemcpyHtoD_v2(sys::CUdeviceptr, *const c_void, usize);
    cuMemcpyDtoH_v2(*mut c_void, sys::CUdeviceptr, usize);
    cuStreamCreate(*mut sys::CUstream, c_uint);
    cuStreamDestroy_v2(sys::CUstream);
    cuStreamSynchronize(sys::CUstream);
    cuStreamBeginCapture_v2(sys::CUstream, sys::CUstreamCaptureMode);
    cuStreamEndCapture(sys::CUstream, *mut sys::CUgraph);
    cuGraphInstantiateWithFlags(*mut sys::CUgraphExec, sys::CUgraph, c_ulonglong);
    cuGraphDestroy(sys::CUgraph);
    cuGraphLaunch(sys::CUgraphExec, sys::CUstream);
    cuGraphExecDestroy(sys::CUgraphExec);
    cuModuleLoadDataEx(*mut sys::CUmodule, *const c_void, c_uint, *mut sys::CUjit_option, *mut *mut c_void);
    cuModuleUnload(sys::CUmodule);
    cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    cuFuncSetAttribute(sys::CUfunction, sys::CUfunction_attribute, c_int);
    cuLaunchKernelEx(*const sys::CUlaunchConfig, sys::CUfunction, *mut *mut c_void, *mut *mut c_void);
    cuTensorMapEncodeTiled(*mut sys::CUtensorMap, u32 = sys::CUtensorMapDataType, c_uint, *mut c_void, *const u64,
                           *const u64, *const c_uint, *const c_uint, u32 = sys::CUtensorMapInterleave,
                           u32 = sys::CUtensorMapSwizzle, u32 = sys::CUtensorMapL2promotion,
                           u32 = sys::CUtensorMapFloatOOBfill);
    cuEventCreate(*mut sys::CUevent, c_uint);
    cuEventDestroy_v2(sys::CUevent);
    cuEventRecord(sys::CUevent, sys::CUstream);
    cuEventElapsedTime(*mut f32, sys::CUevent, sys::CUevent);
}

/// A version of CUDA, as `cuDriverGetVersion` gives it: 12040 is 12.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl Version {
    /// The oldest that is enough: NVIDIA's driver 525.
    pub const NEEDED: Version = Version(12_000);
    /// The oldest that records, in a graph, that a grid may begin before the one before has ended: NVIDIA's driver 545.
    pub const DEPENDENT_LAUNCHES: Version = Version(12_030);
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Why no driver can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoDriver {
    /// Its library cannot be loaded.
    #[error(
        "there is no CUDA driver: libcuda.so.1 cannot be loaded, and a GPU needs NVIDIA's driver 525 or later; `llamac \
         doctor` says how to get it, and `--device cpu` needs none"
    )]
    Absent,
    /// Older than what is used.
    #[error(
        "the driver is of CUDA {found}, needed is CUDA {}: install NVIDIA's driver 525 or later",
        Version::NEEDED
    )]
    Old {
        /// Its version.
        found: Version,
    },
    /// A function is not in it.
    #[error("the driver, of CUDA {found}, has no {function}: install NVIDIA's driver 525 or later")]
    Lacks {
        /// Its version.
        found: Version,
        /// The function.
        function: &'static str,
    },
    /// It is there and does not work.
    #[error("the driver does not start: {said}")]
    Broken {
        /// What it said.
        said: String,
    },
}

/// What a driver refused, in its own words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {said}")]
pub struct Failure {
    /// The device, as the command line names it.
    pub device: String,
    /// The function that was called.
    pub call: &'static str,
    /// Its result.
    pub code: u32,
    /// What the driver calls that.
    pub said: String,
}

impl From<Failure> for DeviceError {
    fn from(failure: Failure) -> DeviceError {
        DeviceError::Driver { said: failure.to_string(), device: failure.device }
    }
}

/// A driver that works.
#[derive(Clone, Copy)]
pub struct Driver {
    /// Its version.
    pub version: Version,
    /// Its functions.
    pub functions: Functions,
}

/// A GPU, as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number, from 0.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Its compute capability in tenths: 8.0 is 80.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Bytes of shared memory that a CTA may have at most.
    pub shared_bytes: u32,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    pub(super) device: sys::CUdevice,
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Gpu { number, name, capability, .. } = self;
        let (capability, gib) = (capability_text(*capability), self.memory_bytes as f64 / f64::from(1 << 30));
        write!(f, "cuda:{number} {name}, compute capability {capability}, {gib:.1} GiB")
    }
}

impl Driver {
    /// Loads the driver and starts it.
    ///
    /// # Errors
    ///
    /// What is missing: [`NoDriver`].
    pub fn load() -> Result<Driver, NoDriver> {
        // SAFETY: opening NVIDIA's library runs its initialisers, which any program that uses CUDA does.
        if !unsafe { sys::is_culib_present() } {
            return Err(NoDriver::Absent);
        }
        // SAFETY: as above.
        Driver::of(unsafe { sys::culib() })
    }

    /// The driver in a library.
    pub(super) fn of(library: &Library) -> Result<Driver, NoDriver> {
        let version = version(library).ok_or(NoDriver::Absent)?;
        if version < Version::NEEDED {
            return Err(NoDriver::Old { found: version });
        }
        let functions =
            Functions::of(library).map_err(|function| NoDriver::Lacks { found: version, function })?;
        Driver::start(version, functions)
    }

    /// Starts a driver that has been found.
    ///
    /// # Errors
    ///
    /// [`NoDriver::Broken`], with what it said.
    pub(super) fn start(version: Version, functions: Functions) -> Result<Driver, NoDriver> {
        let driver = Driver { version, functions };
        // SAFETY: any thread may call it at any time, with 0 (CUDA Driver API, "Initialization").
        let code = unsafe { (functions.cuInit)(0) };
        let started = driver.checked("cuda", "cuInit", code);
        started.map_err(|failure| NoDriver::Broken { said: failure.to_string() })?;
        Ok(driver)
    }

    /// All GPUs, in the driver's order.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn gpus(&self) -> Result<Vec<Gpu>, Failure> {
        let mut count = 0;
        // SAFETY: it writes a number to a live place.
        let code = unsafe { (self.functions.cuDeviceGetCount)(&mut count) };
        self.checked("cuda", "cuDeviceGetCount", code)?;
        (0..count.max(0) as u32).map(|number| self.gpu(number)).collect()
    }

    fn gpu(&self, number: u32) -> Result<Gpu, Failure> {
        use sys::CUdevice_attribute as Attribute;
        let Functions { cuDeviceGet, cuDeviceGetName, cuDeviceGetAttribute, cuDeviceTotalMem_v2, .. } =
            self.functions;
        let name = format!("cuda:{number}");
        let checked = |call, code| self.checked(&name, call, code);
        let mut device = 0;
        // SAFETY: it writes a number to a live place, as do those below.
        checked("cuDeviceGet", unsafe { cuDeviceGet(&mut device, number as c_int) })?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: as above.
            checked("cuDeviceGetAttribute", unsafe { cuDeviceGetAttribute(&mut value, attribute, device) })?;
            Ok(value.max(0) as u32)
        };
        let mut memory_bytes = 0;
        // SAFETY: as above.
        checked("cuDeviceTotalMem_v2", unsafe { cuDeviceTotalMem_v2(&mut memory_bytes, device) })?;
        let mut text = [0u8; 256];
        // SAFETY: it writes at most as many bytes as it is told that there are.
        let code = unsafe { cuDeviceGetName(text.as_mut_ptr().cast(), text.len() as c_int, device) };
        checked("cuDeviceGetName", code)?;
        let (major, minor) = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        Ok(Gpu {
            number,
            name: until_nul(&text),
            capability: 10 * major + minor,
            sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            memory_bytes: memory_bytes as u64,
            device,
        })
    }

    /// What a result means.
    pub(super) fn checked(&self, device: &str, call: &'static str, code: u32) -> Result<(), Failure> {
        if code == 0 {
            return Ok(());
        }
        let words = |ask: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
            let mut text = ptr::null();
            // SAFETY: any code may be asked for; it sets a live pointer to a text that is never freed, or to null.
            let known = unsafe { ask(code, &mut text) } == 0 && !text.is_null();
            // SAFETY: as above.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let Functions { cuGetErrorName, cuGetErrorString, .. } = self.functions;
        let name = words(cuGetErrorName).unwrap_or_else(|| format!("error {code}"));
        let said = match words(cuGetErrorString) {
            Some(words) => format!("{name} ({words})"),
            None => name,
        };
        Err(Failure { device: device.to_string(), call, code, said })
    }
}

/// The driver's version; none if the library is not CUDA's.
fn version(library: &Library) -> Option<Version> {
    // SAFETY: the type is the function's by invariant 1; every driver has it.
    let ask = unsafe { library.get::<unsafe extern "C" fn(*mut c_int) -> u32>("cuDriverGetVersion\0") };
    let mut version = 0;
    // SAFETY: it writes a number to a live place, and may be called before `cuInit`.
    (unsafe { ask.ok()?(&mut version) } == 0).then_some(Version(version))
}

/// A text that ends at its first 0.
pub(super) fn until_nul(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).trim().to_string()
}

/// No memory, for a result: the one that leaves everything as it was.
pub(super) fn is_out_of_memory(code: u32) -> bool {
    code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32
}

/// Results after which a context does nothing any more: faults of a kernel, which the driver gives back again and again
/// ("the process must be terminated and relaunched"), and devices that are gone (CUDA Driver API, "CUresult").
pub(super) fn is_sticky(code: u32) -> bool {
    use sys::CUresult as Result;
    const STICKY: [Result; 17] = [
        Result::CUDA_ERROR_DEINITIALIZED,
        Result::CUDA_ERROR_DEVICE_UNAVAILABLE,
        Result::CUDA_ERROR_ECC_UNCORRECTABLE,
        Result::CUDA_ERROR_NVLINK_UNCORRECTABLE,
        Result::CUDA_ERROR_ILLEGAL_ADDRESS,
        Result::CUDA_ERROR_LAUNCH_TIMEOUT,
        Result::CUDA_ERROR_CONTEXT_IS_DESTROYED,
        Result::CUDA_ERROR_ASSERT,
        Result::CUDA_ERROR_HARDWARE_STACK_ERROR,
        Result::CUDA_ERROR_ILLEGAL_INSTRUCTION,
        Result::CUDA_ERROR_MISALIGNED_ADDRESS,
        Result::CUDA_ERROR_INVALID_ADDRESS_SPACE,
        Result::CUDA_ERROR_INVALID_PC,
        Result::CUDA_ERROR_LAUNCH_FAILED,
        Result::CUDA_ERROR_EXTERNAL_DEVICE,
        Result::CUDA_ERROR_MPS_CLIENT_TERMINATED,
        Result::CUDA_ERROR_UNKNOWN,
    ];
    STICKY.iter().any(|&sticky| sticky as u32 == code)
}
