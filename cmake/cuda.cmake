# libdeep_ep_cuda.so: the engine for NVIDIA GPUs, which the Python module opens at run time (csrc/cuda/abi.h). Kernels are
# compiled by custom commands, because CMake's own CUDA language asks more of the machine than a compiler does, and
# because what ptxas says of each kernel is kept: <build>/cuda/<name>.ptxas, read by scripts/kernel_resources.py.

string(TOUPPER "${DEEP_EP_CUDA}" DEEP_EP_CUDA)
if(NOT DEEP_EP_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DEEP_EP_CUDA=${DEEP_EP_CUDA}: expected AUTO, ON or OFF")
endif()

# Sets `reason`, empty if kernels can be compiled with this C++ compiler; then also nvcc_version, and cuda_include:
# where nvcc itself looks. FindCUDAToolkit of the CMake that we still accept loses an nvcc that is a link.
function(deep_ep_find_nvcc reason)
  find_program(DEEP_EP_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
  if(NOT DEEP_EP_NVCC)
    set(${reason} "there is no nvcc: put it on PATH or set CUDA_HOME" PARENT_SCOPE)
    return()
  endif()
  set(probe ${CMAKE_BINARY_DIR}/cuda/probe.cu)
  file(WRITE ${probe} "#include <string>\n__global__ void probe() {}\n")
  # nvcc takes some C++ compilers and refuses others, newer ones mostly.
  execute_process(COMMAND ${DEEP_EP_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 -E ${probe}
    RESULT_VARIABLE status OUTPUT_VARIABLE text ERROR_VARIABLE said)
  execute_process(COMMAND ${DEEP_EP_NVCC} --version OUTPUT_VARIABLE version)
  if(NOT status EQUAL 0 OR NOT version MATCHES " V([0-9.]+)")
    string(STRIP "${said}" said)
    set(${reason} "${DEEP_EP_NVCC} does not work with ${CMAKE_CXX_COMPILER}: ${said}" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS 12.0)
    set(${reason} "${DEEP_EP_NVCC} is of CUDA ${version}: 12.0 or later is needed" PARENT_SCOPE)
    return()
  endif()
  if(text MATCHES "\"([^\"]+)/cuda_runtime\\.h\"")
    set(include ${CMAKE_MATCH_1})
  endif()
  find_library(DEEP_EP_CUDART cudart_static HINTS ${include}/../lib ${include}/../lib64 NO_DEFAULT_PATH)
  if(NOT DEEP_EP_CUDART)
    set(${reason} "${include}: there is no libcudart_static.a beside it" PARENT_SCOPE)
    return()
  endif()
  set(${reason} "" PARENT_SCOPE)
  set(nvcc_version ${version} PARENT_SCOPE)
  set(cuda_include ${include} PARENT_SCOPE)
endfunction()

set(DEEP_EP_BUILDS_CUDA OFF)
if(DEEP_EP_CUDA STREQUAL "AUTO" AND (DEEP_EP_SANITIZE OR NOT is_linux))
  set(why "not with a sanitizer, and on Linux only")
elseif(NOT DEEP_EP_CUDA STREQUAL "OFF")
  deep_ep_find_nvcc(why)
  if(NOT why)
    set(DEEP_EP_BUILDS_CUDA ON)
  elseif(DEEP_EP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DEEP_EP_CUDA=ON, but ${why}. DEEP_EP_CUDA=OFF builds without GPUs")
  endif()
else()
  set(why "DEEP_EP_CUDA=OFF")
endif()
if(NOT DEEP_EP_BUILDS_CUDA)
  message(STATUS "deep_ep_py: without NVIDIA GPUs (${why})")
  return()
endif()

set(known "80;90;100")
if(nvcc_version VERSION_LESS 12.8)
  set(known "80;90")
endif()
set(DEEP_EP_CUDA_ARCHITECTURES "" CACHE STRING "What kernels are compiled for (${known}), and PTX of the last one")
if(NOT DEEP_EP_CUDA_ARCHITECTURES)
  set(DEEP_EP_CUDA_ARCHITECTURES ${known})
endif()
string(REPLACE ";" ", sm_" shown "${DEEP_EP_CUDA_ARCHITECTURES}")
message(STATUS "deep_ep_py: with NVIDIA GPUs (CUDA ${nvcc_version}, sm_${shown})")

file(WRITE ${CMAKE_BINARY_DIR}/cuda/nvcc_version "${nvcc_version}\n")

# ccache takes "-Xcompiler <option>" for the end of the options that it knows, and would compile everything anew.
set(host_flags -fPIC,-Wall,-ffp-contract=off)
if(DEEP_EP_WERROR)
  string(APPEND host_flags ,-Werror)
endif()
set(nvcc_flags -std=c++17 -O3 -fmad=false -ccbin ${CMAKE_CXX_COMPILER} -I${CMAKE_CURRENT_SOURCE_DIR}/csrc -Xptxas -v
  --compiler-options=${host_flags})
foreach(architecture IN LISTS DEEP_EP_CUDA_ARCHITECTURES)
  list(APPEND nvcc_flags -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
list(GET DEEP_EP_CUDA_ARCHITECTURES -1 last)
list(APPEND nvcc_flags -gencode arch=compute_${last},code=compute_${last})
list(APPEND nvcc_flags -diag-suppress=128) # "loop is not reachable": in one instantiation of a template
if(DEEP_EP_WERROR)
  list(APPEND nvcc_flags -Werror=all-warnings)
endif()

file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cpp)
file(GLOB kernel_headers CONFIGURE_DEPENDS csrc/cuda/*.h csrc/cuda/*.hpp csrc/cuda/*.cuh csrc/protocol/*.hpp)
set(compile_script ${CMAKE_CURRENT_SOURCE_DIR}/cmake/compile_kernel.cmake)
set(kernel_objects)
foreach(source IN LISTS kernel_sources)
  get_filename_component(name ${source} NAME_WE)
  set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
  add_custom_command(
    OUTPUT ${object}
    BYPRODUCTS ${CMAKE_BINARY_DIR}/cuda/${name}.ptxas
    COMMAND ${CMAKE_COMMAND} -DLOG=${CMAKE_BINARY_DIR}/cuda/${name}.ptxas -P ${compile_script} --
            ${DEEP_EP_LAUNCHER} ${DEEP_EP_NVCC} ${nvcc_flags} -c ${source} -o ${object}
    # Every header: a few files too many when one changes, and no list that can be out of date.
    DEPENDS ${source} ${kernel_headers} ${compile_script}
    COMMENT "Compiling kernels of ${name}.cu"
    VERBATIM)
  list(APPEND kernel_objects ${object})
endforeach()

add_library(deep_ep_cuda MODULE ${cuda_sources} ${kernel_objects} $<TARGET_OBJECTS:deep_ep_protocol>)
target_include_directories(deep_ep_cuda SYSTEM PRIVATE ${cuda_include})
# The runtime is linked statically and looks for the driver when it is first asked, so that the library opens where
# there is none.
target_link_libraries(deep_ep_cuda PRIVATE deep_ep_options ${DEEP_EP_CUDART} ${CMAKE_DL_LIBS} rt)
target_link_options(deep_ep_cuda PRIVATE -Wl,--no-undefined)
deep_ep_export_abi(deep_ep_cuda)
